"""What this machine can do, and which lessons run live on it: `make doctor`, or `python -m course.doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from kernels.runtime import SelfTest, TritonMode, self_test, triton_mode

ROOT = Path(__file__).resolve().parent.parent
REDIS_PORT = 6379

Need = Literal["cpu", "triton", "hopper"]

# What a lesson needs to run live, by its number. A notebook that is not named here makes a test fail.
LESSON_NEEDS: dict[str, Need] = {"00": "cpu", "01": "cpu", "02": "cpu", "03": "cpu", "04": "cpu", "05": "triton"}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: what was looked for; the same on every machine.
        verdict: "yes", "no", or "partly".
        found: what is here.
        meaning: what follows from it for the course.
    """

    name: str
    verdict: Literal["yes", "partly", "no"]
    found: str
    meaning: str = ""


def main() -> None:
    console = Console()
    with console.status("Looking at this machine…"):
        found = rows()
    console.print(table(found))


def rows() -> list[Row]:
    """Looks at the machine: 5 to 10 seconds, most of it for the self-tests' imports. Needs no GPU and no server."""
    mode = triton_mode()
    return [
        machine(),
        python(),
        torch_version(),
        cuda(),
        *triton(mode),
        flash_attn(),
        flash_attn_3(),
        redis(),
        kernels_package(),
        *lessons(mode),
    ]


def table(found: list[Row]) -> Table:
    """The rows as a `rich` table, which shows in a terminal and in a notebook."""
    marks = {"yes": "[green]✓[/]", "partly": "[yellow]~[/]", "no": "[dim]–[/]"}
    result = Table(title="What this machine can do")
    for column in ("", "", "here", "so"):
        result.add_column(column, overflow="fold")
    for row in found:
        result.add_row(marks[row.verdict], row.name, row.found, row.meaning)
    return result


def machine() -> Row:
    """The operating system, the processor and its cores."""
    return Row("machine", "yes", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores")


def python() -> Row:
    """The version of Python, and whether the course is tested with it."""
    tested = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Row("Python", "yes" if tested else "no", platform.python_version(), "" if tested else "needs 3.11 to 3.13")


def torch_version() -> Row:
    """The version of torch, and its threads."""
    return Row("torch", "yes", torch.__version__, f"{torch.get_num_threads()} threads")


def cuda() -> Row:
    """The CUDA device, and what its generation can run."""
    if not torch.cuda.is_available():
        return Row("CUDA device", "no", "none", "lessons run on the CPU; GPU figures are stored measurements")
    properties = torch.cuda.get_device_properties(0)
    found = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    if (properties.major, properties.minor) < (8, 0):
        return Row("CUDA device", "partly", found, "older than sm_80: PyTorch's attention only")
    return Row("CUDA device", "yes", found, "lessons measure on it")


def triton(mode: TritonMode) -> Iterator[Row]:
    """Triton's version, where its kernels run, and whether a small product comes out right there."""
    if mode.name == "none":
        yield Row("Triton", "no", "none", mode.reason)
        return
    where = {"gpu": "kernels run on the GPU", "interpreter": "kernels run in the interpreter"}[mode.name]
    yield Row("Triton", "yes", importlib.metadata.version("triton"), f"{where}: {mode.reason}")
    if mode.name == "gpu":
        yield test_row("Triton on the GPU", self_test("gpu"), "")
    trap = "bf16 is silently wrong in the interpreter: the course loads it to fp32 first"
    yield test_row("Triton's interpreter", self_test("interpreter"), trap)


def test_row(name: str, test: SelfTest, trap: str) -> Row:
    """A self-test's row; `trap` is told where only bf16 is wrong."""
    if not test.right:
        return Row(name, "no", test.summary(), "try the versions of constraints.txt")
    if test.wrong:
        return Row(name, "partly", test.summary(), trap if test.wrong == ["bf16"] else "")
    return Row(name, "yes", test.summary())


def flash_attn() -> Row:
    """flash-attn, if it is installed."""
    return peer("flash-attn", "flash_attn", "optional; `make gpu` installs it on a CUDA machine")


def flash_attn_3() -> Row:
    """FlashAttention-3's Hopper build, if it is installed."""
    return peer("FlashAttention-3", "flash_attn_interface", "optional; Hopper (sm_90) only, built from its sources")


def peer(name: str, module: str, without: str) -> Row:
    """A library to compare with: its version, or why it is not used."""
    if importlib.util.find_spec(module) is None:
        return Row(name, "no", "not installed", without)
    try:
        version = getattr(importlib.import_module(module), "__version__", "installed")
    except Exception as error:  # a build for another torch fails with whatever its loader raises
        return Row(name, "no", f"does not import: {type(error).__name__}", "built for another torch: `make gpu` again")
    return Row(name, "yes", version)


def redis() -> Row:
    """Asks a server on this machine only, and waits a fifth of a second at most."""
    if importlib.util.find_spec("redis") is None:
        return Row("Redis", "no", "no client", "optional; memories are kept on disk")
    from redis import Redis, RedisError

    client = Redis(port=REDIS_PORT, socket_connect_timeout=0.2, socket_timeout=0.2)
    try:
        client.ping()
    except RedisError:
        return Row("Redis", "partly", f"client, no server on port {REDIS_PORT}", "optional; memories are kept on disk")
    finally:
        client.close()
    return Row("Redis", "yes", f"server on port {REDIS_PORT}")


def kernels_package() -> Row:
    """Hugging Face publishes another package called `kernels`: which one does an import find?"""
    import kernels

    version = getattr(kernels, "__version__", "unknown")
    if Path(kernels.__file__ or "").resolve().parent.parent == ROOT:
        return Row("package `kernels`", "yes", f"the course's, {version}", "transformers does not take it for its own")
    return Row("package `kernels`", "no", f"another one, {version}", "lessons would import it: use the course's .venv")


def lessons(mode: TritonMode) -> Iterator[Row]:
    """How each lesson runs on this machine."""
    for notebook in lesson_notebooks():
        number, title = notebook.stem.split("_", 1)
        if number in LESSON_NEEDS:  # not a notebook of the reader's own
            how = lesson_mode(LESSON_NEEDS[number], mode)
            yield Row(f"lesson {number}", "yes" if how == "live" else "partly", how, title.replace("_", " "))


def lesson_notebooks() -> list[Path]:
    """The notebooks of the lessons, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def lesson_mode(need: Need, mode: TritonMode) -> str:
    """How a lesson runs where Triton runs in this mode: live, emulated, or with stored results."""
    hopper = mode.name == "gpu" and torch.cuda.get_device_capability() == (9, 0)
    if need == "cpu" or hopper or (need == "triton" and mode.name == "gpu"):
        return "live"
    return "emulated" if mode.name != "none" else "with stored results"


if __name__ == "__main__":
    main()

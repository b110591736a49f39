"""The machine of a benchmark: its description, and the timing of functions on it."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import sensors
from benchmarks.timing import Timing, on_cpu, on_gpu

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "flash-attn", "flashinfer-python")
BROKEN = 3  # exit status of a process whose CUDA context is lost
SECONDS_A_CASE = 1.0  # for all functions of a comparison together
Case = TypeVar("Case")
Result = TypeVar("Result")


class Unable(Exception):
    """Why something that may fail did: the error's first line, or how it took an earlier process down."""


@dataclass
class Machine:
    """Where suites run.

    Args:
        dry_run: run everything in the interpreter, on the CPU, at tiny sizes: no figure means anything.
        until: by `time.monotonic()`, which all processes share: after it no case is begun.
        whole_grid: check all of a suite's grid.
        part: (number, parts): which part of the checks this process runs.
        failed: what is not tried again, and why: the subjects of failed checks, and what `attempt` was told before.
        note: is told what `attempt` is about to try, and "" after it.
        state: the GPU's clock, power and reasons to slow down, during the last timing.
    """

    dry_run: bool
    until: float = math.inf
    whole_grid: bool = False
    part: tuple[int, int] = (0, 1)
    failed: dict[str, str] = field(default_factory=dict)
    note: Callable[[str], None] = lambda _: None
    state: sensors.Reading = field(default_factory=dict)

    @property
    def device(self) -> str:
        """ "cuda", or "cpu" in a dry run."""
        return "cpu" if self.dry_run else "cuda"

    def out_of_time(self) -> bool:
        """Whether no further case should be begun."""
        return time.monotonic() > self.until

    def share(self, cases: Iterable[Case], together: int = 1) -> list[Case]:
        """This process's part of the checks.

        Args:
            cases: all of them, the most important ones first.
            together: the number of consecutive cases that share a compilation, and go to the same process.
        """
        number, parts = self.part
        return [case for i, case in enumerate(cases) if i // together % parts == number]

    def attempt(self, subject: str, function: Callable[[], Result]) -> Result:
        """Calls a function that may fail, at the cost of nothing but itself.

        Where it takes the CUDA context or the process down, a new process begins the case again without it.

        Args:
            subject: names the function and its case.

        Raises:
            Unable: it raised, or did not survive an earlier attempt.
        """
        if subject in self.failed:
            raise Unable(self.failed[subject])
        self.note(subject)
        try:
            result = function()
            self.synchronize()
        except Exception as error:  # a library may raise any type, also while it compiles itself
            if self.broken():
                print(f"{subject}: {first_line(error)}", file=sys.stderr, flush=True)
                sys.exit(BROKEN)
            self.note("")
            self.failed[subject] = first_line(error)
            raise Unable(self.failed[subject]) from error
        self.note("")
        return result

    def synchronize(self) -> None:
        """Waits for the GPU; raises what went wrong on it."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def broken(self) -> bool:
        """Whether the CUDA context is lost: every further call in this process would fail."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def describe(self) -> dict[str, Any]:
        """Device, driver, its clock and limits, versions and date: a part of every stored result."""
        found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "driver": "none"}
        found["gpu"] = sensors.NO_GPU
        if not self.dry_run:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = {"device": torch.cuda.get_device_name(), "driver": _first_line(query)}
            found["gpu"] = sensors.read(sensors.uuid_of_current_gpu())
        versions = {name: _version(name) for name in PACKAGES}
        cuda = {"cuda": str(torch.version.cuda), "python": platform.python_version()}
        return {**found, **versions, **cuda, "date": datetime.now(UTC).isoformat(timespec="seconds")}

    def time(self, functions: dict[str, Callable[[], object]], seconds: float = SECONDS_A_CASE) -> dict[str, Timing]:
        """Times functions in turns, see `benchmarks.timing`, and keeps the GPU's `state` meanwhile.

        Args:
            functions: by name.
            seconds: for all of them together.

        Returns:
            The timings by name.
        """
        if self.dry_run:
            self.state = sensors.NO_GPU
            return on_cpu(functions)
        watch = sensors.Watch(sensors.uuid_of_current_gpu())
        timings = on_gpu(functions, seconds, self._larger_than_cache, watch)
        self.state = watch.summary()
        return timings

    @cached_property
    def _larger_than_cache(self) -> torch.Tensor:
        return torch.empty(256 * 2**20, dtype=torch.uint8, device=self.device)

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of a large bf16 matrix product on random data: the 100% of "share of matmul peak"."""
        n = 64 if self.dry_run else 8192
        a, b = torch.randn(2, n, n, device=self.device).to(torch.float32 if self.dry_run else torch.bfloat16)
        return 2 * n**3 / self.time({"matmul": lambda: a @ b})["matmul"].median * 1000

    @cached_property
    def peak_bandwidth(self) -> float:
        """Bytes/s of a copy within GPU memory, reads and writes counted."""
        nbytes = 2**16 if self.dry_run else 2**32
        source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=self.device)  # zeros could be faster
        target = torch.empty_like(source)
        return 2 * source.numel() / self.time({"copy": lambda: target.copy_(source)})["copy"].median * 1000


def first_line(error: BaseException) -> str:
    """An error on one line: its type, and its message as far as the first line end."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with "+changes" where files differ from it; "unknown" in a copy without git."""
    head = _first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+changes" if changed not in ("", "unknown") else head


def _first_line(command: list[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.splitlines()[0].strip() if answer.strip() else ""

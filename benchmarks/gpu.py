"""`make bench-gpu`: every kernel suite on this machine's GPU, correctness first, then times beside other libraries.

    python -m benchmarks.gpu --out FOLDER      needs a CUDA device, torch and triton, and nothing else
    python -m benchmarks.gpu --dry-run         walks through the suites on a CPU, in the interpreter, at tiny sizes

Every suite runs in child processes with a time limit: a suite that fails, hangs or corrupts its CUDA context is
reported, and the others go on. The checks of a suite run in several processes at a time, so that kernels are compiled
in parallel and are in Triton's cache when the suite is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import lessons, suites
from benchmarks.machine import ROOT, Machine, commit
from kernels.runtime import triton_mode

NEEDS = (
    "make bench-gpu needs a CUDA device of sm_80 or newer, and a Python with torch and triton; it installs nothing.\n"
    "There is none here: {reason}.\n"
    "On a GPU machine: make bench-gpu OUT=folder   (PYTHON=python3 takes the machine's own torch)\n"
    "Here: make bench-gpu ARGS=--dry-run           walks through every suite in the interpreter"
)
MAX_CHECKING = 8  # processes that check a suite at a time
CHECKING_BYTES = 8 * 2**30  # GPU memory of one of them: its CUDA context, and naive attention in float64
CHECKING = 0.4  # share of a suite's time that its checks may take
LESSON_SECONDS = 40.0
SOFT = 0.85  # share of a limit after which no case is begun; at the limit the process is killed


@dataclass
class SuiteResult:
    """One suite: how many checks passed or were left out, its rows, and its failure (empty if none)."""

    name: str
    title: str = ""
    checked: int = 0
    left_out: int = 0
    rows: list[dict] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


def main() -> None:
    arguments = parse()
    if arguments.child:
        sys.exit(run_child(arguments))
    reason = "" if arguments.dry_run else what_is_missing()
    if reason:
        sys.exit(NEEDS.format(reason=reason))
    deadline = time.monotonic() + 60 * arguments.minutes
    machine = Machine(arguments.dry_run)
    about = {**machine.describe(), "commit": arguments.commit or commit(), "dry_run": machine.dry_run}
    names = arguments.suite or suites.names()
    notebooks = lessons.notebooks_with_gpu_cells()
    results = []
    for number, name in enumerate(names):
        left = deadline - time.monotonic() - LESSON_SECONDS * len(notebooks)
        results.append(run_suite(name, left / (len(names) - number), arguments))
        write(results[-1], about, arguments.out or default_folder(about))
    for path in notebooks:
        command = [sys.executable, "-m", "benchmarks.lessons", str(path)]
        start = time.monotonic()
        failure = supervise([command], LESSON_SECONDS, arguments.dry_run)[0]
        seconds = time.monotonic() - start
        results.append(SuiteResult(path.stem, "GPU cells of the lesson", failure=failure, seconds=seconds))
    print(table(results, machine))
    sys.exit(any(result.failure for result in results))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; benchmarks/results/<machine> if left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU")
    parser.add_argument("--suite", action="append", choices=suites.names(), help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything; what does not fit is left out")
    parser.add_argument("--whole-grid", action="store_true", help="check every case of the grids: half an hour more")
    parser.add_argument("--commit", help="of a copy without git")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a ChildRun, as JSON
    return parser.parse_args()


def what_is_missing() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    mode = triton_mode()
    return "" if mode.name == "gpu" else mode.reason


def run_suite(name: str, seconds: float, arguments: argparse.Namespace) -> SuiteResult:
    """Checks a suite, in several processes, then measures it in one more."""
    start = time.monotonic()
    result = SuiteResult(name)
    if arguments.dry_run:
        run_children(result, [ChildRun(name, ["check", "measure"], seconds)], arguments)
    else:
        room = torch.cuda.get_device_properties(0).total_memory // CHECKING_BYTES
        parts = max(1, min(MAX_CHECKING, os.cpu_count() or 1, room))
        limit = 3600.0 if arguments.whole_grid else CHECKING * seconds
        run_children(result, [ChildRun(name, ["check"], limit, part, parts) for part in range(parts)], arguments)
        if not result.failure:  # the speed of a wrong kernel means nothing
            spent = 0.0 if arguments.whole_grid else time.monotonic() - start
            run_children(result, [ChildRun(name, ["measure"], seconds - spent)], arguments)
    result.seconds = time.monotonic() - start
    return result


@dataclass
class ChildRun:
    """The work of one child process: steps of a suite within `seconds`, and which part of the checks is its own."""

    suite: str
    steps: list[str]
    seconds: float
    part: int = 0
    parts: int = 1
    progress: str = ""  # the file that holds its SuiteResult so far


def run_children(result: SuiteResult, runs: list[ChildRun], arguments: argparse.Namespace) -> None:
    """Starts a child process per run, all at the same time, and adds up their results."""
    print(f"—— {result.name}: {' and '.join(runs[0].steps)} ——", flush=True)
    options = [name for name in ("--dry-run", "--whole-grid") if getattr(arguments, name[2:].replace("-", "_"))]
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            run.progress = str(Path(folder, f"{run.part}.json"))
        commands = [
            [sys.executable, "-m", "benchmarks.gpu", *options, "--child", json.dumps(asdict(run))] for run in runs
        ]
        failures = supervise(commands, runs[0].seconds, arguments.dry_run)
        for run, failure in zip(runs, failures, strict=True):
            found = SuiteResult(run.suite)
            if Path(run.progress).exists():
                found = SuiteResult(**json.loads(Path(run.progress).read_text()))
            result.title = found.title or result.title
            result.checked += found.checked
            result.left_out += found.left_out
            result.rows += found.rows
            result.failure = result.failure or found.failure or failure


def supervise(commands: list[list[str]], seconds: float, dry_run: bool) -> list[str]:
    """Runs commands at the same time, and kills those that exceed the limit.

    Returns:
        For each command its failure, empty where it ended by itself with status 0.
    """
    environment = os.environ | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry_run else {})
    deadline = time.monotonic() + seconds
    children = [subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) for command in commands]
    failures = []
    try:
        for child in children:
            try:
                code = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                failures.append(f"no end after {seconds:.0f} s")
            else:
                ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
                failures.append(ended if code else "")
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # and the compilers that it has started
                child.wait()
    return failures


def run_child(arguments: argparse.Namespace) -> bool:
    """The child process: runs its steps, and saves the result after each row. True where it failed."""
    run = ChildRun(**json.loads(arguments.child))
    machine = Machine(arguments.dry_run, SOFT * run.seconds, arguments.whole_grid, (run.part, run.parts))
    result = SuiteResult(run.suite)

    def save() -> None:
        result.left_out = machine.left_out
        unfinished = Path(run.progress).with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(result)))
        unfinished.replace(run.progress)

    steps: dict[str, Callable] = {"check": check, "measure": measure}
    for name in run.steps:
        try:
            steps[name](result, machine, save)
        except Exception as error:
            traceback.print_exc()
            result.failure = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            break
    save()
    return bool(result.failure)


def check(result: SuiteResult, machine: Machine, save: Callable[[], None]) -> None:
    """Runs a suite's comparisons and notes how many cases were right. Raises where one is wrong."""
    suite = suites.load(result.name)
    result.title = (suite.__doc__ or "").splitlines()[0]
    result.checked = suite.check(machine)
    save()


def measure(result: SuiteResult, machine: Machine, save: Callable[[], None]) -> None:
    """Measures a suite and saves the result after each row, so that a timeout loses none."""
    for row in suites.load(result.name).measure(machine):
        result.rows.append(row)
        print(line(row), flush=True)
        save()


def write(result: SuiteResult, about: dict, folder: Path) -> None:
    """Writes a result as JSON, named after its suite, to a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"suite": result.name, "title": result.title, "machine": about, "checked": result.checked}
    stored |= {"checks left out": result.left_out, "failure": result.failure}
    stored |= {"seconds": round(result.seconds, 1), "rows": result.rows}
    (folder / f"{result.name}.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")


def default_folder(about: dict) -> Path:
    """Where results go: a folder of benchmarks/results named after the GPU, or one of runs for a dry run."""
    kind = "dry-run" if about["dry_run"] else about["device"]
    return ROOT / ("runs" if about["dry_run"] else "benchmarks/results") / kind.lower().replace(" ", "-")


def table(results: list[SuiteResult], machine: Machine) -> str:
    """All rows of all suites, and what failed, as text."""
    lines = [""]
    for result in results:
        lines += [f"{result.name}: {result.title}"] + [f"  {line(row)}" for row in result.rows]
        verdict = f"FAILED in {result.failure}" if result.failure else "ok"
        left_out = f" ({result.left_out} more were left out: no time)" if result.left_out else ""
        checked = f"{result.checked} checks{left_out}"
        lines.append(f"  {verdict}, {checked}, {len(result.rows)} rows, {result.seconds:.0f} s")
    if machine.dry_run:
        lines.append(
            "A dry run: checks and comparisons were walked through. Other libraries, the choice of tiles and the GPU's "
            "clock were not, and no figure above means anything."
        )
    return "\n".join(lines)


def line(row: dict) -> str:
    """name=value pairs, with four significant digits."""
    shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
    texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values())
    return "  ".join(f"{key}={text}" for key, text in zip(shown, texts, strict=True))


if __name__ == "__main__":
    main()

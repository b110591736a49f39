"""`make bench-gpu`: every kernel suite on this machine's GPU, correctness first, then times beside other libraries.

    python -m benchmarks.gpu --out FOLDER      needs a CUDA device, torch and triton, and nothing else
    python -m benchmarks.gpu --dry-run         walks through the suites on a CPU, in the interpreter, at tiny sizes

There is one deadline. Each suite has its share of the time that is left, its checks a share of that; what does not fit
is left out and counted, and a suite is timed whether its checks have all ended or not. Each suite runs in child
processes, several at a time for the checks, so that kernels are compiled in parallel and are in Triton's cache when the
suite is timed. A case that takes its process down costs itself. Results are written after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import lessons, suites
from benchmarks.children import Child, ChildRun, Progress, run_children, supervise
from benchmarks.machine import ROOT, Machine, commit
from benchmarks.work import failed_checks, line
from kernels.runtime import triton_mode

NEEDS = (
    "make bench-gpu needs a CUDA device of sm_80 or newer, and a Python with torch and triton; it installs nothing.\n"
    "There is none here: {reason}.\n"
    "On a GPU machine: make bench-gpu OUT=folder   (PYTHON=python3 takes the machine's own torch)\n"
    "Here: make bench-gpu ARGS=--dry-run           walks through every suite in the interpreter"
)
MAX_CHECKING = 8  # processes that check a suite at a time
CHECKING_BYTES = 8 * 2**30  # GPU memory of one of them: its CUDA context, and naive attention in float64
CHECKING, CHECKING_WHOLE_GRID = 0.4, 0.85  # share of a suite's time that its checks may take
MINUTES, MINUTES_WHOLE_GRID = 7.5, 60.0
LESSON_SECONDS = 40.0


@dataclass
class SuiteResult:
    """One suite, as far as it has come.

    Args:
        checked: comparisons that were right.
        left_out: cases that were not begun or did not end in time, by step: "check", "time".
        why_not: why it cannot run on this machine.
        slow: the cases that a deadline stopped.
        lost: what took its process down and was gone on without, by its name: how.
        failures: each with its step, case and error.
    """

    name: str
    title: str = ""
    checked: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    why_not: str = ""
    slow: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failure(self) -> str:
        """The first failure on one line, "" where there is none."""
        if not self.failures:
            return ""
        first, more = self.failures[0], len(self.failures) - 1
        case = f" ({first['case']})" if first["case"] else ""
        return f"{first['step']}: {first['error']}{case}" + (f", and {more} more" if more else "")

    def add(self, progress: Progress) -> None:
        """Adds what a child did."""
        self.title, self.why_not = progress.title or self.title, progress.why_not or self.why_not
        self.checked += progress.checked
        for step, total in progress.total.items():
            self.left_out[step] = self.left_out.get(step, 0) + total - progress.ended.get(step, 0)
        self.slow += progress.slow
        self.lost |= progress.lost
        self.rows += progress.rows
        self.failures += progress.failures


def main() -> None:
    """Runs the suites that were asked for, then the lessons' GPU cells; exits with 1 where something failed."""
    start = time.monotonic()
    arguments = parse()
    reason = "" if arguments.dry_run else what_is_missing()
    if reason:
        sys.exit(NEEDS.format(reason=reason))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped from outside: results so far are written"))
    deadline = start + 60 * (arguments.minutes or (MINUTES_WHOLE_GRID if arguments.whole_grid else MINUTES))
    machine = Machine(arguments.dry_run)
    about = {**machine.describe(), "commit": arguments.commit or commit(), "dry_run": machine.dry_run}
    folder = arguments.out or default_folder(about)
    names = arguments.suite or suites.names()
    notebooks = lessons.notebooks_with_gpu_cells()
    results = []
    for number, name in enumerate(names):
        left = deadline - LESSON_SECONDS * len(notebooks) - time.monotonic()
        until = time.monotonic() + left / (len(names) - number)
        results.append(run_suite(name, until, arguments, lambda result: write(result, about, folder)))
    results += [run_lesson(path, deadline, arguments) for path in notebooks]
    print(table(results, machine))
    sys.exit(any(result.failures for result in results))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; benchmarks/results/<machine> if left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU")
    parser.add_argument("--suite", action="append", choices=suites.names(), help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, help="for everything, 7.5 if left out; what does not fit is left out")
    parser.add_argument("--whole-grid", action="store_true", help="check every case of the grids; 60 minutes")
    parser.add_argument("--commit", help="of a copy without git")
    return parser.parse_args()


def what_is_missing() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    mode = triton_mode()
    return "" if mode.name == "gpu" else mode.reason


def run_suite(
    name: str, until: float, arguments: argparse.Namespace, write: Callable[[SuiteResult], None]
) -> SuiteResult:
    """Checks a suite, in several processes, then times it in one more.

    Args:
        name: of the suite.
        until: its deadline, by `time.monotonic()`.
        arguments: of the command line.
        write: is told what there is, after each case.
    """
    start = time.monotonic()
    share = CHECKING_WHOLE_GRID if arguments.whole_grid else CHECKING
    steps = {"check": start + share * (until - start), "time": until}
    before: list[Progress] = []

    def so_far(found: Iterable[Progress]) -> SuiteResult:
        result = SuiteResult(name, seconds=time.monotonic() - start)
        for progress in (*before, *found):
            result.add(progress)
        return result

    def run(names: tuple[str, ...], parts: int, failed: dict[str, str]) -> list[Progress]:
        print(f"—— {name}: {' and '.join(names)} ——", flush=True)
        own = [(step, steps[step]) for step in names]
        files = [str(Path(folder, f"{names[0]}-{part}.json")) for part in range(parts)]
        runs = [ChildRun(name, own, file, part, parts, failed) for part, file in enumerate(files)]
        children = [Child(run, *child_command(arguments)) for run in runs]
        return run_children(children, on_change=lambda found: write(so_far(found)))

    with tempfile.TemporaryDirectory() as folder:
        if arguments.dry_run:
            before += run(("check", "time"), 1, {})
        else:
            room = torch.cuda.get_device_properties(0).total_memory // CHECKING_BYTES
            before += run(("check",), max(1, min(MAX_CHECKING, os.cpu_count() or 1, room)), {})
            failed = {what: why for progress in before for what, why in failed_checks(progress).items()}
            before += run(("time",), 1, failed)
    write(so_far([]))
    return so_far([])


def child_command(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a child process, without its run."""
    options = [name for name in ("--dry-run", "--whole-grid") if getattr(arguments, name[2:].replace("-", "_"))]
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if arguments.dry_run else {}
    return [sys.executable, "-m", "benchmarks.work", *options], os.environ | interpreted


def run_lesson(path: Path, deadline: float, arguments: argparse.Namespace) -> SuiteResult:
    """Runs a lesson's GPU cells; a lesson that the deadline stops is left out."""
    start = time.monotonic()
    result = SuiteResult(path.stem, "GPU cells of the lesson")
    left = min(LESSON_SECONDS, deadline - start)
    if left <= 0:
        result.left_out["time"] = 1
        return result
    command = [sys.executable, "-m", "benchmarks.lessons", str(path)]
    if error := supervise(command, left, child_command(arguments)[1]):
        result.failures.append({"step": "time", "case": "", "error": error})
    result.seconds = time.monotonic() - start
    return result


def write(result: SuiteResult, about: dict, folder: Path) -> None:
    """Writes a result as JSON, named after its suite, to a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {"suite": result.name, "title": result.title, "machine": about, "checked": result.checked}
    stored |= {f"cases left out of {step}": number for step, number in result.left_out.items()}
    stored |= {"left out because": result.why_not, "stopped by the deadline": result.slow, "lost": result.lost}
    stored |= {"failure": result.failure, "failures": result.failures}
    stored |= {"seconds": round(result.seconds, 1), "rows": result.rows}
    path = folder / f"{result.name}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def default_folder(about: dict) -> Path:
    """Where results go: a folder of benchmarks/results named after the GPU, or one of runs for a dry run."""
    kind = "dry-run" if about["dry_run"] else about["device"]
    return ROOT / ("runs" if about["dry_run"] else "benchmarks/results") / kind.lower().replace(" ", "-")


def table(results: list[SuiteResult], machine: Machine) -> str:
    """All rows of all suites, and what failed, as text."""
    lines = [""]
    for result in results:
        lines += [f"{result.name}: {result.title}"] + [f"  {line(row)}" for row in result.rows]
        lines += [f"  lost: {what}: {how}" for what, how in result.lost.items()]
        lines += [f"  stopped by the deadline: {case}" for case in result.slow]
        lines.append(f"  {verdict(result)}, {result.seconds:.0f} s")
    if machine.dry_run:
        lines.append(
            "A dry run: checks and comparisons were walked through. Other libraries, the choice of tiles and the GPU's "
            "clock were not, and no figure above means anything."
        )
    return "\n".join(lines)


def verdict(result: SuiteResult) -> str:
    """What became of a suite on one line."""
    if result.why_not:
        return f"left out: {result.why_not}"
    left_out = {step: f" ({n} cases left out: no time)" if n else "" for step, n in result.left_out.items()}
    checks = f"{result.checked} checks{left_out.get('check', '')}"
    rows = f"{len(result.rows)} rows{left_out.get('time', '')}"
    return f"{f'FAILED in {result.failure}' if result.failures else 'ok'}, {checks}, {rows}"


if __name__ == "__main__":
    main()

"""`make bench-gpu`: every kernel suite on this machine's GPU, correctness first, then times beside other libraries.

    python -m benchmarks.gpu --out FOLDER      needs a CUDA device, torch and triton, and nothing else
    python -m benchmarks.gpu --dry-run         walks through the suites on a CPU, in the interpreter, at tiny sizes

Every suite runs in child processes with a time limit: one that fails, hangs or spoils its CUDA context is reported, and
the others go on. Its checks run in several at a time, so that what they compile is compiled in parallel, and is in
Triton's cache when the suite is timed.
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
CHECKING_BYTES = 8 * 2**30  # what one of them may need: its CUDA context, and naive attention in float64
CHECKING = 0.4  # the part of a suite's time that its checks may take
LESSON_SECONDS = 40.0
SOFT = 0.85  # of a limit: no case is begun after it; at the limit itself the process is killed


@dataclass
class Outcome:
    """What became of a suite: how many checks passed, its rows, and what went wrong."""

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
    outcomes = []
    for number, name in enumerate(names):
        left = deadline - time.monotonic() - LESSON_SECONDS * len(notebooks)
        outcomes.append(run_suite(name, left / (len(names) - number), arguments))
        write(outcomes[-1], about, arguments.out or default_folder(about))
    for path in notebooks:
        command = [sys.executable, "-m", "benchmarks.lessons", str(path)]
        start = time.monotonic()
        failure = supervise([command], LESSON_SECONDS, arguments.dry_run)[0]
        seconds = time.monotonic() - start
        outcomes.append(Outcome(path.stem, "GPU cells of the lesson", failure=failure, seconds=seconds))
    print(table(outcomes, machine))
    sys.exit(any(outcome.failure for outcome in outcomes))


def parse() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; benchmarks/results/<machine> if left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU")
    parser.add_argument("--suite", action="append", choices=suites.names(), help="only this one; may be repeated")
    parser.add_argument(
        "--minutes", type=float, default=7.5, help="for everything; what is not done by then is left out"
    )
    parser.add_argument("--whole-grid", action="store_true", help="check every case of the grids: half an hour more")
    parser.add_argument("--commit", help="of a copy without git")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # Task, as JSON
    return parser.parse_args()


def what_is_missing() -> str:
    """Why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    mode = triton_mode()
    return "" if mode.name == "gpu" else mode.reason


def run_suite(name: str, seconds: float, arguments: argparse.Namespace) -> Outcome:
    """Checks a suite, in several processes, then measures it in one more."""
    start = time.monotonic()
    outcome = Outcome(name)
    if arguments.dry_run:
        run_tasks(outcome, [Task(name, ["check", "measure"], seconds)], arguments)
    else:
        room = torch.cuda.get_device_properties(0).total_memory // CHECKING_BYTES
        parts = max(1, min(MAX_CHECKING, os.cpu_count() or 1, room))
        limit = 3600.0 if arguments.whole_grid else CHECKING * seconds
        run_tasks(outcome, [Task(name, ["check"], limit, part, parts) for part in range(parts)], arguments)
        if not outcome.failure:  # a kernel that is wrong has no speed
            spent = 0.0 if arguments.whole_grid else time.monotonic() - start
            run_tasks(outcome, [Task(name, ["measure"], seconds - spent)], arguments)
    outcome.seconds = time.monotonic() - start
    return outcome


@dataclass
class Task:
    """What a child process does: steps of a suite, in so many seconds; of its checks the part with this number."""

    suite: str
    steps: list[str]
    seconds: float
    part: int = 0
    parts: int = 1
    report: str = ""  # the file in which it says what it has done so far


def run_tasks(outcome: Outcome, tasks: list[Task], arguments: argparse.Namespace) -> None:
    """Runs tasks at the same time, each in a child process, and adds up what they report."""
    print(f"—— {outcome.name}: {' and '.join(tasks[0].steps)} ——", flush=True)
    options = [name for name in ("--dry-run", "--whole-grid") if getattr(arguments, name[2:].replace("-", "_"))]
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            task.report = str(Path(folder, f"{task.part}.json"))
        commands = [
            [sys.executable, "-m", "benchmarks.gpu", *options, "--child", json.dumps(asdict(task))] for task in tasks
        ]
        failures = supervise(commands, tasks[0].seconds, arguments.dry_run)
        for task, failure in zip(tasks, failures, strict=True):
            found = Outcome(task.suite)
            if Path(task.report).exists():
                found = Outcome(**json.loads(Path(task.report).read_text()))
            outcome.title = found.title or outcome.title
            outcome.checked += found.checked
            outcome.left_out += found.left_out
            outcome.rows += found.rows
            outcome.failure = outcome.failure or found.failure or failure


def supervise(commands: list[list[str]], seconds: float, dry_run: bool) -> list[str]:
    """Runs commands at the same time, and kills what has not ended in time.

    Returns:
        For each what went wrong: empty where it ended by itself, with 0.
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
                os.killpg(child.pid, signal.SIGKILL)  # with the compilers that it has started
                child.wait()
    return failures


def run_child(arguments: argparse.Namespace) -> bool:
    """Does a task in the process that `run_tasks` started, and reports after each row. True where it failed."""
    task = Task(**json.loads(arguments.child))
    machine = Machine(arguments.dry_run, SOFT * task.seconds, arguments.whole_grid, (task.part, task.parts))
    outcome = Outcome(task.suite)

    def report() -> None:
        outcome.left_out = machine.left_out
        unfinished = Path(task.report).with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(outcome)))
        unfinished.replace(task.report)

    steps: dict[str, Callable] = {"check": check, "measure": measure}
    for name in task.steps:
        try:
            steps[name](outcome, machine, report)
        except Exception as error:
            traceback.print_exc()
            outcome.failure = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            break
    report()
    return bool(outcome.failure)


def check(outcome: Outcome, machine: Machine, report: Callable[[], None]) -> None:
    """Runs a suite's comparisons and notes how many cases were right. Raises where one is wrong."""
    suite = suites.load(outcome.name)
    outcome.title = (suite.__doc__ or "").splitlines()[0]
    outcome.checked = suite.check(machine)
    report()


def measure(outcome: Outcome, machine: Machine, report: Callable[[], None]) -> None:
    """Measures a suite and reports after each row, so that a timeout loses none."""
    for row in suites.load(outcome.name).measure(machine):
        outcome.rows.append(row)
        print(line(row), flush=True)
        report()


def write(outcome: Outcome, about: dict, folder: Path) -> None:
    """Writes an outcome as JSON, named after its suite, to a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"suite": outcome.name, "title": outcome.title, "machine": about, "checked": outcome.checked}
    result |= {"checks left out": outcome.left_out, "failure": outcome.failure}
    result |= {"seconds": round(outcome.seconds, 1), "rows": outcome.rows}
    (folder / f"{outcome.name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def default_folder(about: dict) -> Path:
    """Where results go: a folder of benchmarks/results named after the GPU, or one of runs for a dry run."""
    kind = "dry-run" if about["dry_run"] else about["device"]
    return ROOT / ("runs" if about["dry_run"] else "benchmarks/results") / kind.lower().replace(" ", "-")


def table(outcomes: list[Outcome], machine: Machine) -> str:
    """All rows of all suites, and what failed."""
    lines = [""]
    for outcome in outcomes:
        lines += [f"{outcome.name}: {outcome.title}"] + [f"  {line(row)}" for row in outcome.rows]
        verdict = f"FAILED in {outcome.failure}" if outcome.failure else "ok"
        left_out = f" ({outcome.left_out} more were left out: no time)" if outcome.left_out else ""
        checked = f"{outcome.checked} checks{left_out}"
        lines.append(f"  {verdict}, {checked}, {len(outcome.rows)} rows, {outcome.seconds:.0f} s")
    if machine.dry_run:
        lines.append(
            "A dry run: checks and comparisons were walked through. Other libraries, the choice of tiles and the GPU's "
            "clock were not, and no figure above means anything."
        )
    return "\n".join(lines)


def line(row: dict) -> str:
    """name=value pairs; three digits of a number are enough to read."""
    shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
    texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values())
    return "  ".join(f"{key}={text}" for key, text in zip(shown, texts, strict=True))


if __name__ == "__main__":
    main()

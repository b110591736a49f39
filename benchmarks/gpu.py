"""`make bench-gpu`: every kernel suite on this machine's GPU, correctness first, then times beside other libraries.

    python -m benchmarks.gpu --out FOLDER      needs a CUDA device, torch and triton, and nothing else
    python -m benchmarks.gpu --dry-run         walks through all of it on a CPU, in the interpreter, at tiny sizes

A suite that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import lessons, suites
from benchmarks.machine import ROOT, Machine, commit
from kernels.runtime import OLDEST_CAPABILITY

NEEDS = (
    "make bench-gpu needs a CUDA device of sm_80 or newer, and a Python with torch and triton; it installs nothing.\n"
    "There is none here: {reason}.\n"
    "On a GPU machine: make bench-gpu OUT=folder   (PYTHON=python3 takes the machine's own torch)\n"
    "Here: make bench-gpu ARGS=--dry-run           walks through every suite in the interpreter"
)


@dataclass
class Outcome:
    """What became of a suite: how many checks passed, its rows, and what went wrong."""

    name: str
    title: str = ""
    checked: int = 0
    rows: list[dict] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


def main() -> None:
    arguments = parse()
    reason = "" if arguments.dry_run else what_is_missing()
    if reason:
        sys.exit(NEEDS.format(reason=reason))
    machine = Machine(arguments.dry_run, 60 * arguments.minutes, arguments.whole_grid)
    about = {**machine.describe(), "commit": arguments.commit or commit(), "dry_run": machine.dry_run}
    outcomes = [Outcome(name) for name in arguments.suite or suites.names()]
    for outcome in outcomes:
        step(outcome, "check", lambda o: check(o, machine))
    for number, outcome in enumerate(outcomes):
        machine.share_time(len(outcomes) - number)
        if not outcome.failure:  # a kernel that is wrong has no speed
            step(outcome, "measure", lambda o: measure(o, machine))
        write(outcome, about, arguments.out or default_folder(about))
    for path in lessons.notebooks_with_gpu_cells():
        outcomes.append(Outcome(path.stem, title="GPU cells of the lesson"))
        step(outcomes[-1], "run", lambda o: lessons.run(ROOT / "notebooks" / f"{o.name}.ipynb"))
    print(table(outcomes, machine))
    sys.exit(any(outcome.failure for outcome in outcomes))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; benchmarks/results/<machine> if left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in the interpreter, on a CPU")
    parser.add_argument("--suite", action="append", choices=suites.names(), help="only this one; may be repeated")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new case is begun after this time")
    parser.add_argument("--whole-grid", action="store_true", help="check every case of the grids: half an hour more")
    parser.add_argument("--commit", help="of a copy without git")
    return parser.parse_args()


def what_is_missing() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < OLDEST_CAPABILITY:
        return "the GPU is sm_{}{}".format(*torch.cuda.get_device_capability())
    return ""


def step(outcome: Outcome, what: str, run: Callable[[Outcome], None]) -> None:
    """Runs a part of a suite; its failure is noted with its last line, and printed whole."""
    print(f"—— {outcome.name}: {what} ——", flush=True)
    start = time.monotonic()
    try:
        run(outcome)
    except Exception as error:
        traceback.print_exc()
        outcome.failure = f"{what}: {type(error).__name__}: {error}".splitlines()[0]
    outcome.seconds += time.monotonic() - start


def check(outcome: Outcome, machine: Machine) -> None:
    suite = suites.load(outcome.name)
    outcome.title = (suite.__doc__ or "").splitlines()[0]
    outcome.checked = suite.check(machine)


def measure(outcome: Outcome, machine: Machine) -> None:
    for row in suites.load(outcome.name).measure(machine):
        outcome.rows.append(row)
        print(line(row), flush=True)


def write(outcome: Outcome, about: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {"suite": outcome.name, "title": outcome.title, "machine": about, "checked": outcome.checked}
    result |= {"failure": outcome.failure, "seconds": round(outcome.seconds, 1), "rows": outcome.rows}
    (folder / f"{outcome.name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def default_folder(about: dict) -> Path:
    kind = "dry-run" if about["dry_run"] else about["device"]
    return ROOT / ("runs" if about["dry_run"] else "benchmarks/results") / kind.lower().replace(" ", "-")


def table(outcomes: list[Outcome], machine: Machine) -> str:
    """All rows of all suites, and what failed."""
    lines = [""]
    for outcome in outcomes:
        lines += [f"{outcome.name}: {outcome.title}"] + [f"  {line(row)}" for row in outcome.rows]
        verdict = f"FAILED in {outcome.failure}" if outcome.failure else "ok"
        lines.append(f"  {verdict}, {outcome.checked} checks, {len(outcome.rows)} rows, {outcome.seconds:.0f} s")
    if machine.dry_run:
        lines.append("A dry run: every line of code was walked through, and no figure above means anything.")
    elif machine.out_of_time():
        lines.append("The time was over before the last case: --minutes gives more.")
    return "\n".join(lines)


def line(row: dict) -> str:
    """name=value pairs; three digits of a number are enough to read."""
    shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
    texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values())
    return "  ".join(f"{key}={text}" for key, text in zip(shown, texts, strict=True))


if __name__ == "__main__":
    main()

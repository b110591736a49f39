"""The child process of `benchmarks.gpu`: works through the cases of a suite, and saves its progress around each.

python -m benchmarks.work '{"suite": …}'      a `benchmarks.children.ChildRun`, as JSON
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
import traceback
from types import ModuleType
from typing import Any

from benchmarks import suites
from benchmarks.children import ChildRun, Progress
from benchmarks.machine import BROKEN, Machine, first_line

SOFT = 0.85  # share of the time to a deadline after which no case is begun; at the deadline the process is killed
ORPHANED = 30.0  # seconds after its last deadline at which a child ends itself, for its parent is gone


def main() -> None:
    """Runs the steps of a `ChildRun`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--whole-grid", action="store_true")
    parser.add_argument("run", type=lambda text: ChildRun(**json.loads(text)))
    arguments = parser.parse_args()
    last = arguments.run.steps[-1][1] - time.monotonic()
    faulthandler.dump_traceback_later(max(0.0, last) + ORPHANED, exit=True)
    work(arguments.run, arguments.dry_run, arguments.whole_grid)


def work(run: ChildRun, dry_run: bool, whole_grid: bool = False) -> Progress:
    """Goes on where the saved progress ends."""
    progress = Progress.load(run.progress)

    def note(subject: str) -> None:
        progress.trying = subject
        progress.save(run.progress)

    machine = Machine(dry_run, whole_grid=whole_grid, part=(run.part, run.parts), note=note)
    machine.failed = run.failed | progress.lost
    machine.failed |= failed_checks(progress)
    try:
        suite = suites.load(run.suite)
        progress.title = (suite.__doc__ or "").splitlines()[0]
        progress.why_not = suite.why_not(machine)
    except Exception as error:
        traceback.print_exc()
        failure = {"step": run.steps[0][0], "case": "", "error": first_line(error), "subject": ""}
        progress.failures.append(failure)
        progress.step = len(run.steps)
    progress.save(run.progress)
    while progress.step < len(run.steps) and not progress.why_not:
        step, until = run.steps[progress.step]
        machine.until = time.monotonic() + SOFT * (until - time.monotonic())
        _work_through(step, suite, machine, progress, run)
        progress.step, progress.next = progress.step + 1, 0
    progress.save(run.progress)
    return progress


def _work_through(step: str, suite: ModuleType, machine: Machine, progress: Progress, run: ChildRun) -> None:
    if step == "check":
        cases = machine.share(suite.checks(machine), getattr(suite, "TOGETHER", 1))
    else:
        cases = list(suite.timings(machine))
    progress.total[step] = len(cases)
    progress.save(run.progress)
    for case in cases[progress.next :]:
        if machine.out_of_time() or (step == "time" and "" in machine.failed):
            return  # the rest is left out; the speed of a wrong kernel means nothing
        progress.running, progress.subject = str(case), suite.subject(case) if step == "check" else ""
        del progress.rows[progress.kept :]  # of the same case, begun before and not ended
        progress.save(run.progress)
        try:
            _run_case(step, suite, machine, progress, run, case)
        except Exception as error:
            traceback.print_exc()
            progress.fail(step, first_line(error))
            if step == "check":
                machine.failed[progress.subject] = first_line(error)
        else:
            progress.end(step)
        progress.save(run.progress)
        if machine.broken():
            sys.exit(BROKEN)


def _run_case(step: str, suite: ModuleType, machine: Machine, progress: Progress, run: ChildRun, case: Any) -> None:
    if step == "check":
        progress.checked += suite.check(machine, case)
        return
    for row in suite.time(machine, case):
        progress.rows.append(row)
        print(line(row), flush=True)
        progress.save(run.progress)


def failed_checks(progress: Progress) -> dict[str, str]:
    """What is not timed, since its check failed, and why."""
    return {failure["subject"]: failure["error"] for failure in progress.failures if failure["step"] == "check"}


def line(row: dict) -> str:
    """name=value pairs, with four significant digits."""
    shown = {key: value for key, value in row.items() if not isinstance(value, dict)}
    texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values())
    return "  ".join(f"{key}={text}" for key, text in zip(shown, texts, strict=True))


if __name__ == "__main__":
    main()

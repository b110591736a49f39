"""`make grade`: grades a folder of submissions, a folder for each student in it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from grading import ROOT, batch, output
from grading.bubblewrap import SandboxError, find_bubblewrap
from grading.grade import Result
from grading.gradebook import take_hand_grades
from grading.remote import Patience
from grading.submission import find_students
from grading.unit import find_units

DONE, SOME_NOT, REFUSED, STOPPED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    # A hidden test may run all of a task's cases, which would tick it off for the instructor.
    os.environ["MINILLM_PROGRESS"] = str(Path(tempfile.gettempdir(), f"grading-{os.getpid()}.json"))
    options = parse(arguments)
    try:
        if not options.unsafe_no_sandbox:
            find_bubblewrap()
        units = find_units()
        wanted = [unit.name for unit in find_units(only=options.unit)]
        students = list(find_students(options.submissions))
        if not students:
            raise ValueError(f"{options.submissions} has no folder in it; each student's notebooks lie in one")
    except (SandboxError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    start = time.monotonic()
    manner = batch.Manner(options.seed, Patience(options.seconds), options.unsafe_no_sandbox)
    every = [one for student in students for one in batch.units_of(student, units, manner)]
    hand = take_hand_grades(options.grades, list(batch.read_all(options.grades)))
    results = batch.stored(options.grades, every)
    if options.again or options.seed is not None:
        results = [result for result in results if result.unit not in wanted]
    batch.forget_the_rest(options.grades, results)
    todo = batch.missing([one for one in every if one.unit.name in wanted], results)
    print(f"{len(students)} students, {len(wanted)} units: {len(todo)} to grade, {len(results)} graded before")
    order = {(one.slug, one.unit.name): place for place, one in enumerate(every)}
    try:
        results += show(todo, options, manner)
        results.sort(key=lambda result: order[result.slug, result.unit])
        output.write(options.grades, units, results, hand)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here; there is no grades.csv until it is through.")
        return STOPPED
    shown = [result for result in results if result.unit in wanted]
    print("\n".join(output.summary(options.grades, shown, time.monotonic() - start)))
    return SOME_NOT if any(result.state == "failed" for result in results) else DONE


def show(todo: list[batch.StudentUnit], options: argparse.Namespace, manner: batch.Manner) -> list[Result]:
    """Grades, with a progress bar; prints a line for each student after the last of the units."""
    waiting = Counter(one.slug for one in todo)
    done: dict[str, list[Result]] = {}
    with tqdm(total=len(todo), unit="notebook", disable=None) as bar:
        for result in batch.run(todo, options.grades, options.jobs, manner):
            own = done.setdefault(result.slug, [])
            own.append(result)
            if len(own) == waiting[result.slug]:
                bar.write(output.line(own), file=sys.stdout)
            bar.update()
    return [result for own in done.values() for result in own]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line: the submissions, and where, how and how fast to grade them."""
    parser = argparse.ArgumentParser(prog="python -m grading", description=__doc__)
    parser.add_argument("submissions", type=Path, help="a folder with a folder for each student")
    parser.add_argument("--unit", default="", help="only the unit whose name begins so, as in 02")
    parser.add_argument("--grades", type=Path, default=ROOT / "grades", help="where results go (default: grades)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--seconds", type=float, default=20, help="for one call of a student's function (default: 20)")
    parser.add_argument("--again", action="store_true", help="grade also what has not changed since")
    parser.add_argument("--seed", type=int, help="of the random inputs, to repeat a grading; it stands in the result")
    parser.add_argument("--unsafe-no-sandbox", action="store_true", help="run the students' code as you, unprotected")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Grades the units of many students: finds those without a valid result, and runs them in a pool of processes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from grading import ROOT
from grading.grade import Result, grade
from grading.gradebook import write_json
from grading.remote import Patience
from grading.submission import Student, Submission, choose
from grading.unit import Unit


@dataclass(frozen=True)
class StudentUnit:
    """One unit of one student, to be graded.

    Attributes:
        key: a hash of everything that its result depends on, but for the random inputs.
    """

    student: str
    slug: str
    unit: Unit
    submission: Submission
    key: str

    def empty(self) -> Result:
        """A result without verdicts."""
        return Result(self.student, self.slug, self.unit.name, key=self.key, unread=self.submission.unread)


@dataclass(frozen=True)
class Manner:
    """How to grade: the arguments of `grade` that are the same for all."""

    seed: int | None = None
    patience: Patience = Patience()
    unsafe: bool = False


def units_of(student: Student, units: list[Unit], manner: Manner) -> Iterator[StudentUnit]:
    """What there is to grade of a student: every unit, whether it was handed in or not."""
    chosen = choose(student, units)
    for unit in units:
        submission = chosen[unit.name]
        parts = [student.name, submission.key, unit.hash, grader_hash(), repr((manner.patience, manner.unsafe))]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        yield StudentUnit(student.name, student.slug, unit, submission, key)


@cache
def grader_hash() -> str:
    """A hash of all code that a verdict depends on, and of the versions of torch and Triton."""
    folders = ["grading", "course/tasks", "minillm", "kernels"]
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256(f"{torch.__version__} {_version('triton')}".encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def result_path(grades: Path, slug: str, unit: str) -> Path:
    """Where the result of one student's unit is stored."""
    return grades / "results" / slug / f"{unit}.json"


def read_all(grades: Path) -> Iterator[Result]:
    """All stored results, valid or not."""
    for path in sorted((grades / "results").glob("*/*.json")):
        with suppress(ValueError, TypeError, KeyError, OSError):
            yield Result.from_json(json.loads(path.read_text(encoding="utf-8")))


def stored(grades: Path, every: list[StudentUnit]) -> list[Result]:
    """The results of an earlier run that are still valid: nothing that they depend on has changed."""
    keys = {(one.slug, one.unit.name): one.key for one in every}
    return [
        result
        for result in read_all(grades)
        if keys.get((result.slug, result.unit)) == result.key and result.state != "failed"
    ]


def forget_the_rest(grades: Path, results: list[Result]) -> None:
    """Deletes everything that shows a score which may no longer be valid, before anything is graded."""
    (grades / "grades.csv").unlink(missing_ok=True)
    keep = {result_path(grades, result.slug, result.unit) for result in results}
    for path in (grades / "results").glob("*/*.json"):
        if path not in keep:
            path.unlink()
    shutil.rmtree(grades / "feedback", ignore_errors=True)


def missing(every: list[StudentUnit], results: list[Result]) -> list[StudentUnit]:
    """The units that have no result."""
    known = {(result.slug, result.unit) for result in results}
    return [one for one in every if (one.slug, one.unit.name) not in known]


def run(todo: list[StudentUnit], grades: Path, processes: int, manner: Manner) -> Iterator[Result]:
    """Grades, and stores each result as soon as it is there.

    Args:
        grades: the folder for results.
        processes: how many run at a time.
    """
    lost: list[StudentUnit] = []
    for result in _in_processes(todo, processes, manner, lost.append):
        yield _store(result, grades)
    for one in lost:  # one of them ended the pool, and it is not known which: each gets a process of its own
        gone: list[StudentUnit] = []
        for result in _in_processes([one], 1, manner, gone.append):
            yield _store(result, grades)
        if gone:
            yield _store(_failed(one, "the grader's process was ended from outside"), grades)


def _store(result: Result, grades: Path) -> Result:
    write_json(result_path(grades, result.slug, result.unit), result.to_json())
    return result


def _in_processes(
    todo: list[StudentUnit], processes: int, manner: Manner, lose: Callable[[StudentUnit], None]
) -> Iterator[Result]:
    if not todo:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grading.batch"])  # torch is imported once, and not again for each pool
    pool = ProcessPoolExecutor(max(1, min(processes, len(todo))), context, _alone)
    try:
        futures: dict[Future[Result], StudentUnit] = {pool.submit(grade_one, one, manner): one for one in todo}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                lose(futures[future])
    except BaseException:
        for process in list(pool._processes.values()):
            process.kill()  # its sandbox dies with it
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alone() -> None:
    """Initialises a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    torch.set_num_threads(1)


def grade_one(one: StudentUnit, manner: Manner) -> Result:
    """Grades one unit of one student; an error of the grader itself becomes a remark."""
    try:
        return grade(one.empty(), one.unit, one.submission, manner.seed, manner.patience, manner.unsafe)
    except Exception as error:
        return _failed(one, f"{type(error).__name__}: {error}")


def _failed(one: StudentUnit, reason: str) -> Result:
    result = one.empty()
    result.state = "failed"
    result.remarks = [*one.submission.remarks, f"not graded: {reason}"]
    return result

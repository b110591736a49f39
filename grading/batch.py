"""Many students, many units: what is to be graded, what still holds from before, and a process for each at a time."""

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
class Job:
    """One student's one unit."""

    student: str
    slug: str
    unit: Unit
    submission: Submission
    key: str

    def empty(self) -> Result:
        return Result(self.student, self.slug, self.unit.name, key=self.key, unread=self.submission.unread)


@dataclass(frozen=True)
class Manner:
    """How to grade: see `grade`."""

    seed: int | None = None
    patience: Patience = Patience()
    unsafe: bool = False


def jobs_of(student: Student, units: list[Unit], manner: Manner) -> Iterator[Job]:
    """A job for each unit; its key changes with everything that a verdict depends on, but for the random inputs."""
    chosen = choose(student, units)
    for unit in units:
        submission = chosen[unit.name]
        parts = [student.name, submission.key, unit.hash, grader_hash(), repr((manner.patience, manner.unsafe))]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        yield Job(student.name, student.slug, unit, submission, key)


@cache
def grader_hash() -> str:
    """Of all code that a verdict comes from."""
    folders = ["grading", "course/tasks", "minillm", "kernels"]
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    digest = hashlib.sha256(f"{torch.__version__} {_version('triton')}".encode())
    for path in [*paths, ROOT / "course" / "lesson.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def result_path(grades: Path, slug: str, unit: str) -> Path:
    return grades / "results" / slug / f"{unit}.json"


def read_all(grades: Path) -> Iterator[Result]:
    """Every result that lies there, whether it still holds or not."""
    for path in sorted((grades / "results").glob("*/*.json")):
        with suppress(ValueError, TypeError, KeyError, OSError):
            yield Result.from_json(json.loads(path.read_text(encoding="utf-8")))


def stored(grades: Path, jobs: list[Job]) -> list[Result]:
    """The results of an earlier run that hold: nothing that they depend on has changed."""
    keys = {(job.slug, job.unit.name): job.key for job in jobs}
    return [
        result
        for result in read_all(grades)
        if keys.get((result.slug, result.unit)) == result.key and result.state != "failed"
    ]


def forget_the_rest(grades: Path, results: list[Result]) -> None:
    """Takes away all that shows a score which may no longer be right, before anything new is known."""
    (grades / "grades.csv").unlink(missing_ok=True)
    keep = {result_path(grades, result.slug, result.unit) for result in results}
    for path in (grades / "results").glob("*/*.json"):
        if path not in keep:
            path.unlink()
    shutil.rmtree(grades / "feedback", ignore_errors=True)


def missing(jobs: list[Job], results: list[Result]) -> list[Job]:
    """The jobs that have no result."""
    known = {(result.slug, result.unit) for result in results}
    return [job for job in jobs if (job.slug, job.unit.name) not in known]


def run(jobs: list[Job], grades: Path, processes: int, manner: Manner) -> Iterator[Result]:
    """Grades, and stores each result as soon as it is there.

    Args:
        grades: the folder for all that is stored.
        processes: how many work at a time.
    """
    lost: list[Job] = []
    for result in _in_processes(jobs, processes, manner, lost.append):
        yield _store(result, grades)
    for job in lost:  # one of them took the others with it, and nobody knows which: each gets a process to itself
        gone: list[Job] = []
        for result in _in_processes([job], 1, manner, gone.append):
            yield _store(result, grades)
        if gone:
            yield _store(_failed(job, "the grader's process was ended from outside"), grades)


def _store(result: Result, grades: Path) -> Result:
    write_json(result_path(grades, result.slug, result.unit), result.to_json())
    return result


def _in_processes(jobs: list[Job], processes: int, manner: Manner, lose: Callable[[Job], None]) -> Iterator[Result]:
    if not jobs:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grading.batch"])  # torch is imported once, and not again for each pool
    pool = ProcessPoolExecutor(max(1, min(processes, len(jobs))), context, _alone)
    try:
        futures: dict[Future[Result], Job] = {pool.submit(grade_job, job, manner): job for job in jobs}
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
    """What a process of the pool does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it decides
    torch.set_num_threads(1)


def grade_job(job: Job, manner: Manner) -> Result:
    """Grades one student's one unit, and turns every fault of the grader's own into a remark."""
    try:
        return grade(job.empty(), job.unit, job.submission, manner.seed, manner.patience, manner.unsafe)
    except Exception as error:
        return _failed(job, f"{type(error).__name__}: {error}")


def _failed(job: Job, reason: str) -> Result:
    result = job.empty()
    result.state = "failed"
    result.remarks = [*job.submission.remarks, f"not graded: {reason}"]
    return result

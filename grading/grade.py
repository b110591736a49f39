"""One student's answers to one unit: the tests run here, on what the student's functions return over there."""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from course.tasks.task import fresh_inputs
from grading.remote import AnswerError, AnswerLost, Patience, StudentProcess, plain
from grading.submission import Cell, Submission, text_answer, to_run
from grading.unit import Test, Unit

MAX_ANSWER = 20_000  # characters of an answer in text: the time to render its page grows with their square


@dataclass
class Verdict:
    """The points for a test cell or for a question, and why.

    Attributes:
        points: None where an instructor has to read the answer.
        message: for the student; it never contains the code of a test.
        cell: the number of the cell with the answer that was judged.
    """

    grade_id: str
    points: float | None
    maximum: float
    message: str
    cell: int | None = None


@dataclass
class Result:
    """The result of one student in one unit, with everything that feedback and gradebook show.

    Attributes:
        state: "graded"; "missing" where there is nothing to grade; "failed" where the grader itself had an error.
        unread: whether it is missing, and something was handed in that could not be read.
        seed: of the random inputs; the same seed repeats the grading.
        key: a hash of everything that the result depends on.
        answers: by grade id, a student's answer to a question in text.
        cells: the student's cells that were run: number, source, error, output.
        comments: by grade id, what an instructor wrote; it is kept apart, by `gradebook`.
    """

    student: str
    slug: str
    unit: str
    state: str = "missing"
    unread: bool = False
    file: str = ""
    key: str = ""
    seed: int = 0
    date: str = ""
    seconds: float = 0
    remarks: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    comments: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The points given."""
        return sum(verdict.points or 0 for verdict in self.verdicts)

    @property
    def maximum(self) -> float:
        """The points that can be had."""
        return sum(verdict.maximum for verdict in self.verdicts)

    @property
    def waiting(self) -> bool:
        """Whether an instructor has to read an answer before the score is complete."""
        return any(verdict.points is None for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """The result as it is stored; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        """The inverse of `to_json`; raises KeyError or TypeError for anything else."""
        verdicts = [Verdict(**verdict) for verdict in content["verdicts"]]
        return cls(**content | {"verdicts": verdicts})


class TestIsBroken(Exception):
    """A test cell of the course that cannot be run: the unit is not graded."""

    __test__ = False


def grade(
    result: Result,
    unit: Unit,
    submission: Submission,
    seed: int | None = None,
    patience: Patience | None = None,
    unsafe: bool = False,
) -> Result:
    """Fills in a result.

    Args:
        result: an empty one, with student and unit.
        seed: of the random inputs; a new one when left out.
        patience: how long to wait.
        unsafe: without a sandbox.

    Raises:
        SandboxError: there is no sandbox here.
    """
    start = time.monotonic()
    result.seed = secrets.randbits(32) if seed is None else seed
    result.date = datetime.now(UTC).isoformat(timespec="seconds")
    result.remarks = list(submission.remarks)
    if submission.file is None:
        result.verdicts = [Verdict(item.grade_id, 0, item.points, "nothing handed in") for item in unit.items]
        return result
    result.file = submission.file.name
    own = to_run(submission.file, unit)
    cells = [(-1 - number, source) for number, source in enumerate(unit.setup(unit.release))]
    cells += [(cell.number, cell.source) for cell in own]
    with StudentProcess(cells, unit.functions, patience or Patience(), unsafe=unsafe) as student:
        try:
            with fresh_inputs(result.seed):
                result.verdicts = list(_judge(unit, student)) if own else _not_answered(unit)
            result.state = "graded"
        except TestIsBroken as error:
            result.state, result.verdicts = "failed", []
            result.remarks.append(f"not graded: {error}")
        result.cells = _cells_with_runs(own, student)
    if result.state == "graded":
        for text in unit.texts:
            answer = text_answer(submission.file, text, unit)
            result.answers[text.grade_id] = answer[:MAX_ANSWER]
            if len(answer) > MAX_ANSWER:
                result.remarks.append(f"{text.grade_id}: cut to {MAX_ANSWER:,} of {len(answer):,} characters")
            points, message = (None, "to be read") if result.answers[text.grade_id] else (0, "not answered")
            result.verdicts.append(Verdict(text.grade_id, points, text.points, message))
    result.seconds = round(time.monotonic() - start, 1)
    return result


def _not_answered(unit: Unit) -> list[Verdict]:
    return [Verdict(test.grade_id, 0, test.points, "not answered") for test in unit.tests]


def _judge(unit: Unit, student: StudentProcess) -> Iterator[Verdict]:
    """A verdict for each test cell. Tests of the same functions are grouped: one definition has to pass them all."""
    groups: dict[tuple[str, ...], list[Test]] = {}
    for test in unit.tests:
        groups.setdefault(test.functions, []).append(test)
    try:
        student.run()
    except AnswerLost as lost:
        yield from (Verdict(test.grade_id, 0, test.points, str(lost)) for test in unit.tests)
        return
    for functions, tests in groups.items():
        if absent := [name for name in functions if not student.candidates[name]]:
            message = "\n".join(student.why_not(name) for name in absent)
            yield from (Verdict(test.grade_id, 0, test.points, message) for test in tests)
            continue
        attempts = (
            [_verdict(unit, test, student, chosen) for test in tests] for chosen in _choices(student, functions)
        )
        yield from _best(attempts)


def _choices(student: StudentProcess, functions: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Which definitions to take: the last ones first, for a notebook may hold several of a function."""
    found = {name: student.candidates[name][::-1] for name in functions}
    for back in range(max(map(len, found.values()), default=1)):
        yield {name: numbers[min(back, len(numbers) - 1)] for name, numbers in found.items()}


def _best(attempts: Iterator[list[Verdict]]) -> list[Verdict]:
    best: list[Verdict] = []
    for attempt in attempts:
        if not best or sum(verdict.points or 0 for verdict in attempt) > sum(verdict.points or 0 for verdict in best):
            best = attempt
        if all(verdict.points == verdict.maximum for verdict in best):
            break
    return best


def _verdict(unit: Unit, test: Test, student: StudentProcess, chosen: dict[str, int]) -> Verdict:
    complaint = _complaint(unit, test, student, chosen)
    cell = next(iter(chosen.values()), None)
    student.revive()
    return Verdict(test.grade_id, 0 if complaint else test.points, test.points, complaint or "right", cell)


def _complaint(unit: Unit, test: Test, student: StudentProcess, chosen: dict[str, int]) -> str:
    """Runs a test cell on a student's functions. Returns the complaint, "" where there is none."""
    try:
        student.run()  # again after a loss; outside the try below: a SandboxError is no wrong answer
    except AnswerLost as lost:
        return str(lost)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with redirect_stdout(io.StringIO()):
        _run(unit.setup(unit.solution), namespace)
        namespace |= {name: student.function(name, number) for name, number in chosen.items()}
        try:
            exec(compile(test.source, "<test>", "exec"), namespace)
        except (AssertionError, AnswerError) as error:
            return plain(str(error), 4000) or "not right"
        except (NameError, ImportError, SyntaxError) as error:
            raise TestIsBroken(f"the test {test.grade_id} cannot be run, {type(error).__name__}: {error}") from None
        except Exception as error:
            return f"the test could not use what came back ({type(error).__name__})"
    return ""


def _run(sources: list[str], namespace: dict[str, Any]) -> None:
    for source in sources:
        try:
            exec(compile(source, "<setup>", "exec"), namespace)
        except Exception as error:
            raise TestIsBroken(f"a setup cell of the solution raises {type(error).__name__}: {error}") from None


def _cells_with_runs(cells: list[Cell], student: StudentProcess) -> list[dict[str, Any]]:
    runs = {run.number: run for run in student.cell_runs}
    found = []
    for cell in cells:
        run = runs.get(cell.number)
        error, output = (run.error, run.output) if run else (None, "")
        found.append({"number": cell.number, "source": cell.source, "error": error, "output": output})
    return found

"""nbgrader's gradebook, in which instructors read answers, comment, and export.

The gradebook is made anew from the results each time, so that no score in it is older than its result. Scores and
comments by hand are read from it before, kept in `hand.json`, and written again where the answer is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat

from grading.feedback import annotated
from grading.grade import Result, Verdict
from grading.unit import Unit, grade_id, is_answer, is_test, is_text, points

FOLDER, DATABASE, HAND = "nbgrader", "gradebook.db", "hand.json"
BEFORE = "gradebook.before.db"  # the last one, in case that something in it is missed

CONFIG = """# Made by `make grade`, and made anew by the next one. Start `jupyter lab` in this folder and open
# nbgrader's formgrader, or run `nbgrader export --to scores.csv` here.
c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "minillm"
"""

Hand = dict[str, dict[str, dict[str, Any]]]  # by slug and unit, by grade id: "of", "score", "comment"


def take_hand_grades(folder: Path, results: list[Result]) -> Hand:
    """Moves scores and comments by hand from the gradebook to `hand.json`, and renames the gradebook.

    Args:
        folder: of all grades.
        results: the stored ones, from which the gradebook was made.
    """
    hand = read_hand_grades(folder)
    database = folder / FOLDER / DATABASE
    if database.exists():
        by_place = {_place(result): result for result in results}
        with _open(database) as book:
            for submission in [s for assignment in book.assignments for s in assignment.submissions]:
                place = f"{submission.student_id}/{submission.name}"
                if place in by_place:
                    hand[place] = hand.get(place, {}) | dict(_written(submission, by_place[place]))
        write_json(folder / HAND, hand)
        database.replace(folder / BEFORE)
    return hand


def read_hand_grades(folder: Path) -> Hand:
    """The scores and comments by hand so far."""
    path = folder / HAND
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def with_hand_grades(result: Result, hand: Hand) -> Result:
    """A result with the scores and comments by hand, where the answer has not changed since."""
    given = {
        name: entry for name, entry in hand.get(_place(result), {}).items() if entry["of"] == _fingerprint(result, name)
    }
    scores = {name: entry["score"] for name, entry in given.items() if entry["score"] is not None}
    verdicts = [
        replace(v, points=scores[v.grade_id], message="graded by hand") if v.grade_id in scores else v
        for v in result.verdicts
    ]
    comments = {name: entry["comment"] for name, entry in given.items() if entry["comment"]}
    return replace(result, verdicts=verdicts, comments=comments)


def write_gradebook(folder: Path, units: list[Unit], results: list[Result], hand: Hand) -> None:
    """Makes nbgrader's folder: the gradebook, and each notebook as the formgrader shows it.

    Args:
        folder: of all grades.
        results: without scores and comments by hand.
    """
    new, place = folder / f".{FOLDER}.new", folder / FOLDER
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    (new / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    by_name = {unit.name: unit for unit in units}
    graded = [result for result in results if result.state == "graded"]
    with _open(new / DATABASE) as book:
        for unit in units:
            _add_unit(book, unit)
        for slug in dict.fromkeys(result.slug for result in results):
            book.add_student(slug)
        for result in graded:
            _add_result(book, result, hand)
        book.db.commit()
    for result in graded:
        path = new / "autograded" / result.slug / result.unit / f"{result.unit}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(annotated(by_name[result.unit], with_hand_grades(result, hand)), path)
    shutil.rmtree(place, ignore_errors=True)
    new.rename(place)


def write_json(path: Path, content: Any) -> None:
    """Writes a file atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path)


@contextmanager
def _open(database: Path) -> Iterator[Any]:
    # nbgrader asks the program `alembic`, which is beside this Python, for the version of its tables.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    from nbgrader.api import Gradebook

    with (
        closing(Gradebook(f"sqlite:///{database.resolve()}", course_id="minillm")) as book,
        warnings.catch_warnings(action="ignore"),  # of SQLAlchemy, about the order in which nbgrader links its objects
    ):
        yield book
        book.engine.dispose()


def _add_unit(book: Any, unit: Unit) -> None:
    book.add_assignment(unit.name)
    book.add_notebook(unit.name, unit.name)
    for cell in unit.release.cells:
        name = grade_id(cell)
        if not name:
            continue
        if is_test(cell) or is_text(cell):
            book.add_grade_cell(name, unit.name, unit.name, max_score=points(cell), cell_type=cell.cell_type)
        if is_answer(cell) or is_text(cell):
            book.add_solution_cell(name, unit.name, unit.name)
        nbgrader = cell.metadata.nbgrader
        kept = {"locked": nbgrader.locked, "checksum": nbgrader.get("checksum")}
        book.add_source_cell(name, unit.name, unit.name, cell_type=cell.cell_type, source=cell.source, **kept)


def _add_result(book: Any, result: Result, hand: Hand) -> None:
    submission = book.add_submission(result.unit, result.slug, timestamp=result.date)
    verdicts = {verdict.grade_id: verdict for verdict in result.verdicts}
    given = hand.get(_place(result), {})
    for grade in submission.notebooks[0].grades:
        verdict: Verdict = verdicts[grade.name]
        grade.auto_score = verdict.points
        entry = given.get(grade.name, {})
        if entry.get("of") == _fingerprint(result, grade.name):
            grade.manual_score = entry["score"]
        grade.needs_manual_grade = verdict.points is None and grade.manual_score is None
    for comment in submission.notebooks[0].comments:
        entry = given.get(comment.name, {})
        if entry.get("of") == _fingerprint(result, comment.name):
            comment.manual_comment = entry["comment"]


def _written(submission: Any, result: Result) -> Iterator[tuple[str, dict[str, Any]]]:
    """By grade id, the score and the comment by hand, and a hash of the answer that they belong to."""
    notebook = submission.notebooks[0]
    scores = {grade.name: grade.manual_score for grade in notebook.grades}
    comments = {comment.name: comment.manual_comment for comment in notebook.comments}
    for name in {**scores, **comments}:
        score, comment = scores.get(name), comments.get(name)
        yield name, {"of": _fingerprint(result, name), "score": score, "comment": comment}


def _fingerprint(result: Result, name: str) -> str:
    """A hash of the answer that a score or a comment belongs to: the text, or else all of the student's code."""
    about = result.answers.get(name) or "\n".join(cell["source"] for cell in result.cells)
    return hashlib.sha256(about.encode()).hexdigest()


def _place(result: Result) -> str:
    return f"{result.slug}/{result.unit}"

"""The output of `make grade`: a table, a page for each student, nbgrader's gradebook, and what is printed."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from grading.feedback import annotated, to_html
from grading.grade import Result
from grading.gradebook import FOLDER, Hand, with_hand_grades, write_gradebook
from grading.unit import Unit


def write(grades: Path, units: list[Unit], results: list[Result], hand: Hand) -> None:
    """Writes the gradebook, the feedback, and last the table: where it exists, the output is complete."""
    by_name = {unit.name: unit for unit in units}
    write_gradebook(grades, units, results, hand)
    complete = [with_hand_grades(result, hand) for result in results]
    for result in tqdm([result for result in complete if result.state != "failed"], "feedback", disable=None):
        path = grades / "feedback" / result.slug / f"{result.unit}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_html(annotated(by_name[result.unit], result), result), encoding="utf-8")
    part = grades / ".grades.csv"
    with open(part, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table(units, complete))
    part.replace(grades / "grades.csv")


def table(units: list[Unit], results: list[Result]) -> Iterator[list[str]]:
    """The rows of grades.csv, the first with the names of the columns."""
    columns = [
        column for unit in units for column in (unit.name, *(f"{unit.name}/{item.grade_id}" for item in unit.items))
    ]
    yield ["student", "folder", *columns, "total", "maximum", "state", "remarks"]
    maximum = sum(unit.maximum for unit in units)
    for slug in dict.fromkeys(result.slug for result in results):
        own = [result for result in results if result.slug == slug]
        scores: dict[str, str] = {}
        for result in own:
            if result.state != "failed":
                scores[result.unit] = f"{result.total:g}"
                scores |= {f"{result.unit}/{v.grade_id}": _points(v.points) for v in result.verdicts}
        total = sum(result.total for result in own)
        absent = _absent(own)
        remarks = [f"{r.unit}: {remark}" for r in own if r.unit not in absent for remark in r.remarks]
        remarks += [f"not handed in: {', '.join(absent)}"] if absent else []
        row = [slug, own[0].student, *(scores.get(column, "") for column in columns)]
        yield list(map(_harmless, [*row, f"{total:g}", f"{maximum:g}", state(units, own), "; ".join(remarks)]))


def _absent(own: list[Result]) -> list[str]:
    """The units that a student did not hand in; a file that could not be read counts as handed in."""
    return sorted(result.unit for result in own if result.state == "missing" and not result.unread)


def _points(points: float | None) -> str:
    return "" if points is None else f"{points:g}"


def state(units: list[Unit], own: list[Result]) -> str:
    """Whether a student's total is final, and if not, why."""
    if any(result.state == "failed" for result in own):
        return "not graded"
    if len(own) < len(units):
        return "not all units graded"
    if any(result.unread for result in own):
        return "see remarks"
    return "answers to be read" if any(result.waiting for result in own) else "graded"


def _harmless(text: str) -> str:
    """The text, escaped where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def line(results: list[Result]) -> str:
    """The line that is printed for a student."""
    parts, absent = [], _absent(results)
    for result in sorted((r for r in results if r.unit not in absent), key=lambda result: result.unit):
        score = f"{result.total:g}/{result.maximum:g}" if result.state != "failed" else "NOT GRADED"
        notes = [*(["to be read"] if result.waiting else []), *result.remarks[result.unread :][:1]]
        parts.append(f"{result.unit} {score}" + (f" ({'; '.join(notes)})" if notes else ""))
    parts += [f"not handed in: {', '.join(absent)}"] if absent else []
    return f"{results[0].student}: " + ", ".join(parts)


def summary(grades: Path, results: list[Result], seconds: float) -> Iterator[str]:
    """The last lines that are printed."""
    count = Counter(result.state for result in results)
    yield f"{count['graded']} graded, {count['missing']} not handed in, {count['failed']} NOT GRADED, {seconds:.0f} s"
    if waiting := sum(result.waiting for result in results):
        yield f"{waiting} with answers to be read: start `jupyter lab` in {grades / FOLDER} (nbgrader's formgrader)"
    yield f"{grades / 'grades.csv'}, {grades / 'feedback'}"

"""Each unit's own solution earns every point, and the same seed gives the same verdicts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grading.grade import MAX_ANSWER, Result, grade
from grading.remote import Patience, StudentProcess
from grading.submission import choose, find_students
from grading.unit import Unit, find_units
from tests.grading.notebooks import WRONG, grade_id, handed_in, needs_bubblewrap, save

UNITS = find_units()


def graded(notebook: dict, unit: Unit, folder, seed: int | None = None) -> Result:
    save(notebook, folder / "ann" / "unit.ipynb")
    (student,) = find_students(folder)
    submission = choose(student, UNITS)[unit.name]
    return grade(Result("ann", "ann", unit.name), unit, submission, seed, Patience(60))


@needs_bubblewrap
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_units_own_solution_earns_all_that_a_test_gives(unit, tmp_path):
    result = graded(json.loads(json.dumps(unit.solution)), unit, tmp_path)
    assert result.state == "graded"
    assert not [(v.grade_id, v.message) for v in result.verdicts if v.points not in (v.maximum, None)]
    assert [v.grade_id for v in result.verdicts if v.points is None] == [text.grade_id for text in unit.texts]


class Here(StudentProcess):
    """A student's process that is none: the function is called here."""

    def run(self) -> None:
        self.candidates = {name: [0] for name in self.wanted}

    def function(self, name: str, candidate: int | None = None) -> Any:
        def same(q: Any, k: Any, v: Any) -> Any:
            return q, q[..., 0].transpose(1, 2)

        same.__name__ = name
        return same


def test_a_seed_repeats_a_grading_and_another_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("grading.grade.StudentProcess", Here)
    messages = []
    for seed in (1, 1, 2):
        result = graded(handed_in(WRONG), UNITS[0], tmp_path, seed)
        assert result.seed == seed
        messages.append([verdict.message for verdict in result.verdicts])
    assert messages[0] == messages[1] != messages[2]


def test_an_answer_in_words_is_cut_where_its_page_would_take_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr("grading.grade.StudentProcess", Here)
    notebook = handed_in(WRONG)
    (question,) = [cell for cell in notebook["cells"] if grade_id(cell) == UNITS[0].texts[0].grade_id]
    question["source"] = "![x" * MAX_ANSWER
    result = graded(notebook, UNITS[0], tmp_path)
    assert len(result.answers[grade_id(question)]) == MAX_ANSWER
    assert "cut to 20,000 of 60,000 characters" in result.remarks[-1]

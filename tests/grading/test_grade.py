"""Each unit's own solution earns every point, and the same seed gives the same verdicts."""

from __future__ import annotations

import json

import pytest

from course.grading.grade import Result, grade
from course.grading.submission import choose, find_students
from course.grading.unit import Unit, find_units
from tests.grading.notebooks import WRONG, handed_in, needs_bubblewrap, save

pytestmark = needs_bubblewrap
UNITS = find_units()


def graded(notebook: dict, unit: Unit, folder, seed: int | None = None) -> Result:
    save(notebook, folder / "ann" / "unit.ipynb")
    (student,) = find_students(folder)
    return grade(Result("ann", "ann", unit.name), unit, choose(student, UNITS)[unit.name], seed)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_units_own_solution_earns_all_that_a_test_gives(unit, tmp_path):
    result = graded(json.loads(json.dumps(unit.solution)), unit, tmp_path)
    assert result.state == "graded"
    assert not [(v.grade_id, v.words) for v in result.verdicts if v.points not in (v.maximum, None)]
    assert [v.grade_id for v in result.verdicts if v.points is None] == [text.grade_id for text in unit.texts]


def test_a_seed_repeats_a_grading_and_another_one_does_not(tmp_path):
    words = []
    for seed in (1, 1, 2):
        result = graded(handed_in(WRONG), UNITS[0], tmp_path, seed)
        assert result.seed == seed
        words.append([verdict.words for verdict in result.verdicts])
    assert words[0] == words[1] != words[2]

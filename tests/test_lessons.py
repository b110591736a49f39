"""Every test belongs to a lesson, to all of them, or to one that is to come."""

from pathlib import Path

import pytest

from tests.conftest import UNITS
from tests.lessons import ALL, FILES, LATER, marks_of

TESTS = Path(__file__).resolve().parent
FOUND = [path.relative_to(TESTS).as_posix() for path in sorted(TESTS.rglob("test_*.py"))]
TASK_UNITS = {"flash_forward": "03_tiling"}


@pytest.mark.parametrize("path", FOUND)
def test_a_test_file_belongs_to_a_lesson(path):
    assert marks_of(f"tests/{path}::test_one", [], {})


def test_every_place_in_the_table_is_there_and_every_mark_is_a_lessons():
    assert all((TESTS / place).exists() for place in FILES)
    marks = {mark for marks in FILES.values() for mark in marks}
    assert marks - {*ALL, *LATER} <= {f"lesson{unit[:2]}" for unit in UNITS}


@pytest.mark.parametrize(
    ("nodeid", "marks"),
    [
        ("tests/cache/test_contiguous.py::test_fork[2 rows]", ("lesson04",)),
        ("tests/attention/test_grid.py::test_all", ("lesson01", "lesson02", "lesson03")),
        ("tests/attention/test_merge.py::test_all", ("lesson02",)),
        ("notebooks/03_tiling.ipynb::Cell 4", ("lesson03",)),
        ("tests/test_notebooks.py::test_stored[solutions/03_tiling/03_tiling.ipynb]", ("lesson03",)),
        ("tests/exercises/test_answers.py::test_wrong[flash_forward-no mask]", ("lesson03",)),
        ("tests/exercises/test_answers.py::test_wrong[else]", ALL),
        ("tests/test_nowhere.py::test_lost", ()),
    ],
)
def test_a_test_gets_the_marks_of_its_id_or_of_its_file(nodeid, marks):
    assert marks_of(nodeid, UNITS, TASK_UNITS) == marks


def test_the_marks_are_there_when_pytest_chooses(request):
    assert request.node.get_closest_marker("all_lessons")
    assert not request.node.get_closest_marker("lesson03")

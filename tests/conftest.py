import pytest
import torch
from hypothesis import settings

from course.doctor import lesson_notebooks
from course.tasks import TASKS
from tests import lessons
from tests.cache.counts import print_counts
from tests.exercises import table

# `make test` runs as many processes as there are cores: threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

# An example that takes long on a busy machine is no fault.
settings.register_profile("course", deadline=None)
settings.load_profile("course")

UNITS = [path.stem for path in lesson_notebooks()]


def pytest_configure(config) -> None:
    for mark, belongs in {
        **{f"lesson{unit[:2]}": f"belongs to {unit}" for unit in UNITS},
        "all_lessons": "no lesson can do without it",
        "later_lessons": "what it is about has no lesson yet",
    }.items():
        config.addinivalue_line("markers", f"{mark}: {belongs}")


def pytest_collection_modifyitems(items) -> None:
    """Each test gets the marks of its lessons, before pytest's own `-m` chooses."""
    units = {name: task.unit for name, task in TASKS.items()}
    for item in items:
        for mark in lessons.marks_of(item.nodeid, UNITS, units):
            item.add_marker(getattr(pytest.mark, mark))


def pytest_terminal_summary(terminalreporter) -> None:
    """A hook here is heard with `-n` too; one beside the tests is not."""
    print_counts(terminalreporter)
    table.pytest_terminal_summary(terminalreporter)

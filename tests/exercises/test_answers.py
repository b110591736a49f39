"""Each task is tried on right answers and on wrong ones. The table of all of them stands at the end of the tests."""

import io
from contextlib import redirect_stdout

import pytest

from tools.run_tests import ROOT
from course.answers import check
from course.tasks import TASKS, NotYet, fresh_inputs
from course.tasks.task import run
from tests.exercises.answers import right_answers, tasks_with_answers, graded_cells, wrong_answers

RIGHT = [(task, name) for task in tasks_with_answers() for name in right_answers(task)]
WRONG = [(task, wrong) for task in tasks_with_answers() for wrong in wrong_answers(task)]
MEASURED = ("memory", "traffic")  # the parts of a task that take long, and that judge more than the result


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_has_an_other_right_answer_and_six_wrong_ones(task):
    assert (ROOT / "tests" / "exercises" / f"{task.name}.py").exists(), "a file with answers is missing"
    names = [wrong.name for wrong in wrong_answers(task)]
    assert len(right_answers(task)) >= 2 and len(names) >= 6 and len(set(names)) == len(names)


@pytest.mark.parametrize(("task", "name"), RIGHT, ids=[f"{task.name}-{name}" for task, name in RIGHT])
def test_a_right_answer_passes_public_and_hidden_tests_on_any_inputs(task, name, record_property):
    function = right_answers(task)[name]
    graded(task, function)
    for seed in range(1, 4):
        with fresh_inputs(seed):
            graded(task, function, [part for part in task.parts if part not in MEASURED])
    record_property("exercise", (task.name, name, "right"))


@pytest.mark.parametrize(("task", "wrong"), WRONG, ids=[f"{task.name}-{wrong.name}" for task, wrong in WRONG])
def test_a_wrong_answer_is_told_what_is_wrong(task, wrong, record_property):
    plain = [case for part in task.parts if part not in MEASURED for case in task.cases(part)]
    measured = [case for part in task.parts if part in MEASURED for case in task.cases(part)]
    if wrong.kept:
        run(task, wrong.function, plain)  # right as far as the result goes
    with pytest.raises(NotYet) as complaint:
        run(task, wrong.function, measured if wrong.kept else plain)
    assert wrong.told in " ".join(str(complaint.value).split())
    record_property("exercise", (task.name, wrong.name, wrong.told))


@pytest.mark.parametrize(("task", "wrong"), WRONG, ids=[f"{task.name}-{wrong.name}" for task, wrong in WRONG])
def test_a_wrong_answer_loses_points_on_any_inputs(task, wrong):
    parts = [part for part in task.parts if (part in MEASURED) == wrong.kept]
    with fresh_inputs(7), pytest.raises(AssertionError):
        graded(task, wrong.function, parts, only_hidden=wrong.kept)  # the public case comes first, and is tried above


def graded(task, function, parts=None, only_hidden=False):
    """Runs a task's graded cells, their hidden tests included, or those alone."""
    if function.__name__ != task.name:
        function.__name__ = task.name
    for part, cell in graded_cells(task).items():
        if parts is None or part in parts:
            source = cell.source.partition("### BEGIN HIDDEN TESTS")[2] if only_hidden else cell.source
            with redirect_stdout(io.StringIO()):
                exec(source, {task.name: function, "check": check})

"""Each writing stop is tried on right answers and on wrong ones; both stand in a file named after it, as for tasks."""

import importlib

import pytest

from course.stops import STOPS
from course.tasks import TASKS, NotYet, fresh_inputs, run
from tests.exercises.answers import right_answers, wrong_answers
from tools.run_tests import ROOT

ANSWERS = {name: importlib.import_module(f"tests.exercises.{name}") for name in STOPS}
RIGHT = [(name, which) for name in STOPS for which in ["model answer", *ANSWERS[name].RIGHT]]
WRONG = [(name, wrong) for name in STOPS for wrong in ANSWERS[name].WRONG]


@pytest.mark.parametrize(("name", "which"), RIGHT, ids=[f"{name}-{which}" for name, which in RIGHT])
def test_a_right_answer_passes_on_any_inputs(name, which, record_property):
    answers = {"model answer": STOPS[name].model_answer} | ANSWERS[name].RIGHT
    for seed in range(4):
        with fresh_inputs(seed):
            run(STOPS[name], answers[which], STOPS[name].cases())
    record_property("exercise", (name, which, "right"))


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=[f"{name}-{wrong.name}" for name, wrong in WRONG])
def test_a_wrong_answer_is_told_what_is_wrong(name, wrong, record_property):
    for seed in range(2):
        with fresh_inputs(seed), pytest.raises(NotYet) as complaint:
            run(STOPS[name], wrong.function, STOPS[name].cases())
        assert wrong.told in " ".join(str(complaint.value).split())
    record_property("exercise", (name, wrong.name, wrong.told))


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_has_another_right_answer_and_three_wrong_ones(name):
    assert ANSWERS[name].RIGHT and len({wrong.name for wrong in ANSWERS[name].WRONG}) >= 3


def test_the_readme_counts_the_answers_that_are_tried():
    right = len(RIGHT) + sum(len(right_answers(task)) for task in TASKS.values())
    wrong = len(WRONG) + sum(len(wrong_answers(task)) for task in TASKS.values())
    words = f"{len(TASKS)} exercises and {len(STOPS)} writing stops were tried on {right} right answers and {wrong} wrong"
    assert words in (ROOT / "README.md").read_text()

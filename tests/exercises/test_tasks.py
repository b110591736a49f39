"""`course.check`, `course.progress`, and what stands in the notebooks about each task."""

import importlib
import json
import re

import nbformat
import pytest
import torch
from rich.console import Console

import course
from tools.run_tests import ROOT
from course.answers import check
from course.tasks import TASKS, NotYet, fresh_inputs
from course.tasks.task import Case, run
from tests.exercises.answers import answer_cell, right_answers, solution, graded_cells

PROGRESS = importlib.import_module("course.tasks.progress")  # the package has a function of that name
EVERY = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


@pytest.fixture
def merge():
    return named("merge", next(iter(right_answers(TASKS["merge"]).values())))


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(PROGRESS, "FILE", tmp_path / "progress.json")
    return tmp_path / "progress.json"


def named(name, function):
    function.__name__ = name
    return function


def text_of(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# ---- the notebooks and the tasks say the same


@EVERY
def test_a_task_has_its_answer_cell_and_a_graded_cell_with_points_for_each_part(task):
    assert re.match(rf"(@triton.jit\n)?def {task.name}\(", answer_cell(task).source)
    cells = graded_cells(task)
    assert list(cells) == list(task.parts)
    for part, cell in cells.items():
        assert cell.metadata.nbgrader.points > 0
        assert cell.source.startswith(f'check({task.name}, "{part}")\n')
        assert "### BEGIN HIDDEN TESTS" in cell.source


@EVERY
def test_minutes_difficulty_and_points_in_the_notebook_are_the_tasks(task):
    points = sum(cell.metadata.nbgrader.points for cell in graded_cells(task).values())
    stars = "●" * task.difficulty + "○" * (5 - task.difficulty)
    assert f"| `{task.name}` | {task.minutes} | {stars} | {points:g} |" in solution(task.unit).cells[0].source


@pytest.mark.parametrize("unit", dict.fromkeys(task.unit for task in TASKS.values()))
def test_points_of_a_unit_add_up(unit):
    in_table = [int(row) for row in re.findall(r"\| (\d+) \|$", solution(unit).cells[0].source, flags=re.M)]
    in_cells = [cell.metadata.get("nbgrader", {}).get("points", 0) for cell in solution(unit).cells]
    assert sum(in_table) == sum(in_cells)


@EVERY
def test_the_lesson_ends_with_its_exercise(task):
    lesson = nbformat.read(ROOT / "notebooks" / f"{task.unit}.ipynb", as_version=4)
    (closing,) = [cell.source for cell in lesson.cells if "**Your turn:**" in cell.source]
    assert f"(../exercises/{task.unit}/{task.unit}.ipynb)" in closing
    stars = "●" * task.difficulty + "○" * (5 - task.difficulty)
    assert f"| `{task.name}` | {task.minutes} | {stars} |" in closing
    assert f"{sum(int(minutes) for minutes in re.findall(r'[|] ([0-9]+) [|]', closing))} minutes" in closing


@EVERY
def test_a_task_says_what_is_graded_and_has_three_folded_hints(task):
    prose = [cell.source for cell in solution(task.unit).cells if cell.cell_type == "markdown"]
    start = next(i for i, text in enumerate(prose) if text.startswith(f"## `{task.name}("))
    about = "\n".join(prose[start : start + 2]).split("\n## ", 1)[0]
    assert "**Graded**" in about
    assert re.findall(r"<summary>(.*?)</summary>", about) == ["Hint 1", "Hint 2", "Hint 3"]


# ---- check


def test_a_right_answer_is_told_so_case_by_case(merge):
    told = str(check(merge))
    assert told.startswith("merge: right\n") and "  ✓ both parts are empty" in told


def test_one_part_is_checked_alone(merge):
    assert "both parts are empty" in str(check(merge, "empty"))
    assert "lse near 1000" not in str(check(merge, "empty"))


def test_a_function_with_another_name_is_no_answer():
    with pytest.raises(ValueError, match="no task is called my_merge: name your function after its task, one of gqa_"):
        check(named("my_merge", lambda: None))


def test_a_part_that_is_not_there_is_named_with_those_that_are(merge):
    with pytest.raises(ValueError, match="merge has no part 'emtpy': one of result, empty, magnitude"):
        check(merge, "emtpy")


def test_a_task_that_is_not_begun_says_so():
    def merge(*_):
        raise NotImplementedError()

    with pytest.raises(NotYet) as complaint:
        check(merge)
    assert str(complaint.value) == "merge: nothing is here yet: write it in place of `raise NotImplementedError()`"


def test_an_error_in_the_answer_is_shown_with_its_line():
    def merge(out_a, lse_a, out_b, lse_b):
        return out_a * lse_a[..., None], lse_a

    with pytest.raises(NotYet, match="RuntimeError: (.|\n)*in the line: return out_a \\* lse_a"):
        check(merge)


def test_each_wrong_case_stands_with_its_reason_and_the_right_ones_are_marked():
    def merge(out_a, lse_a, out_b, lse_b):
        return (lse_a - lse_b).sigmoid().transpose(1, 2)[..., None] * (out_a - out_b) + out_b, lse_a.logaddexp(lse_b)

    with pytest.raises(NotYet) as complaint:
        check(merge, "empty")
    lines = str(complaint.value).splitlines()
    assert lines[0] == "merge: not yet, 2 of 4 cases wrong"
    assert "  ✓ the left part is empty" in lines
    assert lines[lines.index("  ✗ both parts are empty") + 1].startswith("      out is NaN at batch 0, query 0, head 0")


def test_a_complaint_is_no_wider_than_a_cell():
    def judge(*_):
        raise NotYet("word " * 60)

    with pytest.raises(NotYet) as complaint:
        run(TASKS["merge"], print, [Case("one", judge)])
    assert max(map(len, str(complaint.value).splitlines())) <= 96 and "word word" in str(complaint.value)


def test_jupyter_shows_a_complaint_without_a_traceback():
    assert NotYet("one\ntwo")._render_traceback_() == ["one", "two"]


def test_an_answer_may_change_what_it_is_given(merge):
    def spoiling(out_a, lse_a, out_b, lse_b):
        result = merge(out_a, lse_a, out_b, lse_b)
        for tensor in (out_a, lse_a, out_b, lse_b):
            tensor.zero_()
        return result

    check(named("merge", spoiling))


# ---- inputs


def inputs_of_one_case():
    seen = []
    case = Case("some title", lambda _, generator: seen.append(torch.randn(8, generator=generator)))
    run(TASKS["merge"], print, [case])
    return seen[0]


def test_a_learner_always_meets_the_same_inputs():
    assert torch.equal(inputs_of_one_case(), inputs_of_one_case())


def test_fresh_inputs_are_others_and_the_same_for_the_same_seed():
    with fresh_inputs(5):
        five = inputs_of_one_case()
        assert torch.equal(five, inputs_of_one_case())
    with fresh_inputs(6):
        assert not torch.equal(five, inputs_of_one_case())
    assert not torch.equal(five, inputs_of_one_case())


# ---- progress


def test_only_a_whole_task_that_is_right_is_ticked_off(merge, own_progress):
    check(merge, "empty")
    assert not own_progress.exists()
    check(merge)
    assert list(json.loads(own_progress.read_text())) == ["merge"]


def test_progress_shows_every_task_and_which_are_done(merge):
    assert f"0 of {len(TASKS)} exercises done" in text_of(course.progress())
    check(merge)
    shown = text_of(course.progress())
    assert f"1 of {len(TASKS)} exercises done" in shown
    (line,) = [line for line in shown.splitlines() if " merge " in line]
    assert "✓" in line and "25" in line and "●●○○○" in line
    assert all(name in shown for name in TASKS)


def test_a_task_keeps_the_day_on_which_it_was_done_first(merge, own_progress):
    own_progress.write_text('{"merge": "2026-01-02"}')
    check(merge)
    assert json.loads(own_progress.read_text()) == {"merge": "2026-01-02"}


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_broken_progress_file_is_begun_anew(content, merge, own_progress):
    own_progress.write_text(content)
    check(merge)
    assert list(json.loads(own_progress.read_text())) == ["merge"]

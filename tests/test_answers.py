"""What a reader calls beside `check`: predictions, model answers, sources; and what `progress` then shows."""

import html
import importlib
import json
import re

import nbformat
import pytest
from IPython.core.formatters import DisplayFormatter
from rich.console import Console

import course
from course import predictions
from course.doctor import lesson_notebooks
from course.source import show_source
from course.stops import STOPS
from course.tasks import CHECKLISTS, TASKS
from course.tasks.task import CheckResult
from minillm.attention import naive_attention
from tests.exercises.answers import solution as solution_notebook
from tools.run_tests import ROOT

ANSWERS = importlib.import_module("course.answers")
NOTES = importlib.import_module("course.tasks.progress")
VIEW = "application/vnd.jupyter.widget-view+json"
LESSONS = [nbformat.read(path, as_version=4) for path in lesson_notebooks()]
NAMES = predictions.names()


@pytest.fixture(autouse=True)
def own_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(NOTES, "FILE", tmp_path / "progress.json")


def shown(name):
    """The widget that a cell `predict(name)` displays."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "display", found.append)
        assert course.predict(name) is None
    (widget,) = found
    return widget


def text_of(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# ---- predictions


@pytest.mark.parametrize("name", NAMES)
def test_a_prediction_has_one_right_choice_among_others_and_a_reason(name):
    asked = predictions.questions(name[:2])[name[3:]]
    assert asked.question.endswith("?") and len(asked.because) > 20
    assert len(set(asked.choices)) == len(asked.choices) >= 2 and asked.right in asked.choices


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_a_button_and_the_answer_appears_after_one_is_pressed(name):
    asked = predictions.questions(name[:2])[name[3:]]
    for number, choice in enumerate(asked.choices):
        widget = shown(name)
        assert [button.description for button in widget.buttons] == asked.choices
        assert widget.verdict.value == ""
        widget.buttons[number].click()
        said = html.unescape(widget.verdict.value)
        assert asked.because in said and asked.right in said
        assert ("Yes: " in said) == (choice == asked.right)


def test_a_page_gets_the_question_with_the_answer_folded_away():
    widget = shown(NAMES[0])
    data = DisplayFormatter().format(widget)[0]
    before, folded = html.unescape(data["text/html"]).split("<details>")
    assert data[VIEW]["model_id"] == widget.model_id
    assert widget.asked.question in before and all(choice in before for choice in widget.asked.choices)
    assert widget.asked.because not in before and widget.asked.because in folded
    assert widget.asked.because not in data["text/plain"]


def test_the_first_choice_counts():
    widget = shown(NAMES[0])
    wrong = next(button for button in widget.buttons if button.description != widget.asked.right)
    right = next(button for button in widget.buttons if button.description == widget.asked.right)
    wrong.click()
    right.click()
    assert NOTES.read() == {f"predict {NAMES[0]}": "wrong"}
    assert f"1 of {len(NAMES)} predictions, 0 right" in text_of(course.progress())


def test_a_prediction_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=f"no prediction is called 99 x: one of {NAMES[0]}"):
        course.predict("99 x")


@pytest.mark.parametrize("lesson", LESSONS, ids=[path.stem for path in lesson_notebooks()])
def test_a_lesson_asks_for_at_least_three_predictions_and_each_of_its_own_once(lesson):
    number = re.search(r"# (\d\d) ·", lesson.cells[0].source)[1]
    calls = [name for cell in lesson.cells for name in re.findall(r'^predict\("(.*)"\)$', cell.source, re.MULTILINE)]
    assert calls == [name for name in NAMES if name.startswith(number)] and len(calls) >= 3


# ---- writing stops


@pytest.mark.parametrize("lesson", LESSONS[1:], ids=[path.stem for path in lesson_notebooks()[1:]])
def test_a_lesson_stops_at_least_twice_for_a_prepared_function_that_is_checked_and_not_used_again(lesson):
    code = [cell.source for cell in lesson.cells if cell.cell_type == "code"]
    stops = [name for name, stop in STOPS.items() if f"lesson{stop.unit[:2]}" == _lesson(lesson)]
    assert len(stops) >= 2
    for name in stops:
        (prepared,) = [index for index, source in enumerate(code) if re.search(rf"^def {name}\(", source, re.MULTILINE)]
        assert "raise NotImplementedError" in code[prepared]
        (checked,) = [index for index, source in enumerate(code) if f"check({name})" in source]
        assert checked > prepared
        others = [source for index, source in enumerate(code) if index not in (prepared, checked)]
        others = [source.replace(f'solution("{name}"', "") for source in others]
        assert not any(re.search(rf"\b{name}\(", source) for source in others), "an untouched lesson would stop there"


def _lesson(notebook):
    return "lesson" + re.search(r"# (\d\d) ·", notebook.cells[0].source)[1]


@pytest.mark.parametrize("name", STOPS)
def test_a_stop_that_is_not_right_is_told_so_and_raises_nothing(name):
    def empty(*_):
        raise NotImplementedError

    empty.__name__ = name
    if "@triton.jit" not in str(course.solution(name)):
        told = course.check(empty)
        assert isinstance(told, CheckResult) and str(told).startswith(f"{name}: nothing is here yet")
    assert NOTES.read() == {}


@pytest.mark.parametrize("name", STOPS)
def test_the_model_answer_of_a_stop_is_closed_until_clicked(name):
    answer = course.solution(name)
    assert f"def {name}(" in answer.code
    assert answer.as_html().startswith("<details>")


# ---- model answers


@pytest.mark.parametrize("name", TASKS)
def test_a_model_answer_opens_after_the_check_or_anyway(name):
    assert "anyway=True" in str(course.solution(name))
    opened = course.solution(name, anyway=True)
    assert f"def {name}(" in opened.code and "SOLUTION" not in opened.code
    assert list(NOTES.read()) == [f"read {name}"]
    NOTES.note(name)
    assert course.solution(name).code == opened.code
    (line,) = [line for line in text_of(course.progress()).splitlines() if f" {name} " in line]
    assert "model answer opened" in line


@pytest.mark.parametrize("name", CHECKLISTS)
def test_a_question_in_words_shows_its_answer_with_points_to_mark_it_by(name):
    text = course.solution(name, anyway=True).data
    cells = [cell for task in TASKS.values() for cell in solution_notebook(task.unit).cells]
    model = next(c.source for c in cells if c.metadata.get("nbgrader", {}).get("grade_id") == name)
    assert model in text and all(f"- [ ] {point}" in text for point in CHECKLISTS[name])
    assert name in NOTES.read() and 3 <= len(CHECKLISTS[name]) <= 5


def test_every_question_in_words_has_its_points():
    paths = (ROOT / "solutions").glob("*/*.ipynb")
    cells = [cell for path in paths for cell in nbformat.read(path, as_version=4).cells]
    words = [cell.metadata.nbgrader.grade_id for cell in cells if _is_question_in_words(cell)]
    assert words and sorted(words) == sorted(CHECKLISTS)


def _is_question_in_words(cell):
    return cell.cell_type == "markdown" and cell.metadata.get("nbgrader", {}).get("grade", False)


def test_where_an_instructor_keeps_the_solutions_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(ANSWERS, "SOLUTIONS", tmp_path)
    with pytest.raises(ValueError, match="ask your instructor"):
        course.solution("merge", anyway=True)
    with pytest.raises(ValueError, match="no task is called mrege: one of gqa_attention"):
        course.solution("mrege")


# ---- sources


def test_a_source_is_monospaced_and_closed_where_asked():
    for folded in (False, True):
        source = show_source(naive_attention, folded=folded)
        data = DisplayFormatter().format(source)[0]
        page = data["text/html"]
        assert "monospace" in page and page.startswith("<details>") == folded
        assert html.unescape(re.sub("<[^>]*>", "", page.split("<pre", 1)[1]).split(">", 1)[-1]).count("\n") > 10
        assert source.code in data["text/plain"] and "minillm/attention/naive.py" in data["text/plain"]


def test_nothing_of_the_code_is_lost_on_its_way_to_a_page():
    source = show_source(naive_attention)
    inside = re.search(r"<pre[^>]*>(.*)</pre>", source.as_html(), re.DOTALL)[1]
    assert html.unescape(re.sub("<[^>]+>", "", inside)) == source.code


# ---- what a broken folder does


def test_a_broken_notebook_of_solutions_is_named(monkeypatch, tmp_path):
    (tmp_path / "02").mkdir()
    (tmp_path / "02" / "a.ipynb").write_text("{broken")
    monkeypatch.setattr(ANSWERS, "SOLUTIONS", tmp_path)
    with pytest.raises(ValueError, match="solutions/02/a.ipynb is no notebook"):
        course.solution("merge", anyway=True)


@pytest.mark.parametrize("text", ["[broken", "number = 3", "[tail]\nquestion = 'How?'"])
def test_a_wrong_file_of_predictions_is_named(text, monkeypatch, tmp_path):
    (tmp_path / "97.toml").write_text(text)
    monkeypatch.setattr(predictions, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match="course/predictions/97.toml: "):
        predictions.questions("97")


def test_a_right_answer_and_a_choice_are_told_where_no_note_can_be_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(NOTES, "FILE", tmp_path / "not there" / "progress.json")
    with pytest.warns(UserWarning, match="progress is not kept"):
        assert "right" in str(course.check(STOPS["online_sum"].model_answer))
    widget = shown(NAMES[0])
    with pytest.warns(UserWarning, match="progress is not kept"):
        widget.buttons[0].click()
    assert widget.verdict.value


def test_a_note_that_is_no_text_counts_as_none():
    NOTES.FILE.write_text('{"merge": ["a day"], "grad_q": "2026-01-01"}')
    assert NOTES.read() == {"grad_q": "2026-01-01"}
    assert f"1 of {len(TASKS)} exercises done" in text_of(course.progress())


def test_notes_are_kept_as_json():
    NOTES.note("merge")
    assert json.loads(NOTES.FILE.read_text()) == NOTES.read()

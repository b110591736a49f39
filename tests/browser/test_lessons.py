"""Every lesson in JupyterLab: opened and run by the menus, its widgets moved by keyboard and by mouse."""

import json

import pytest

from course.doctor import lesson_notebooks
from course.run_tests import ROOT
from tests.browser.lab import FOCUSABLE

LESSONS = [path.relative_to(ROOT) for path in lesson_notebooks()]


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request, lab):
    yield lab.open(request.param)
    lab.close_notebook()


# One test, because a lesson is long to run: once is enough.
def test_a_lesson_runs_its_widgets_follow_their_controls_and_nothing_leaves_this_machine(lesson, lab):
    lab.run_all(lesson)
    assert "[ ]:" not in lesson.prompts(), "not every cell was run"
    assert not lesson.errors()

    widgets = lesson.widgets()
    assert len(widgets) >= len(cells_with_a_widget(lesson.path)), "a widget shows no controls"
    for widget in widgets:
        widget.controls[0].locator(FOCUSABLE).first.focus()
        for number, control in enumerate(widget.controls):
            if number:
                widget.tab_to(control)
            widget.changes_with(widget.press_key, control)
        for control in widget.controls:
            widget.changes_with(widget.use_mouse, control)

    for width in (800, 1280):
        with lab.width(width):
            assert not lesson.cut_off(), f"at {width} pixels"
    assert not lab.take_faults()


def cells_with_a_widget(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code" and "widgets." in "".join(cell["source"])]

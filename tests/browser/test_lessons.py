"""Every lesson in JupyterLab: opened and run by the menus, its widgets moved by keyboard and by mouse."""

import json

import pytest

from course.doctor import lesson_notebooks
from tests.browser.lab import FOCUSABLE
from tools.run_tests import ROOT

# Later lessons run longer: begun first, two processes end at about the same time.
LESSONS = [path.relative_to(ROOT) for path in reversed(lesson_notebooks())]


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def lesson(request, lab):
    yield lab.open(request.param)
    lab.close_notebook()


# One test, because a lesson is long to run: once is enough.
def test_a_lesson_runs_its_widgets_follow_their_controls_and_nothing_leaves_this_machine(lesson, lab):
    cells = json.loads(lesson.path.read_text(encoding="utf-8"))["cells"]
    pictures = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    with_widgets = [source for source in code if "widgets." in source or 'predict("' in source]

    lesson.read_through(len(pictures))
    assert not lesson.without_alt_text(), "as it is stored"
    lab.run_all(lesson)
    lesson.read_through(len(pictures))
    assert "[ ]:" not in lesson.prompts(), "not every cell was run"
    assert not lesson.errors()
    assert not lesson.without_alt_text()

    widgets = lesson.widgets()
    assert len(widgets) >= len(with_widgets), "a widget shows no controls"
    for widget in widgets:
        widget.controls[0].locator(FOCUSABLE).first.focus()
        for number, control in enumerate(widget.controls):
            if number:
                widget.tab_to(control)
            widget.changes_with(widget.press_key, control)
        for control in widget.controls:
            widget.changes_with(widget.use_mouse, control)

    for source in lesson.folded_sources():
        source.locator("summary").click()
        code = source.locator("pre")
        assert code.is_visible() and "monospace" in code.evaluate("pre => getComputedStyle(pre).fontFamily")

    for width in (800, 1280):
        with lab.width(width):
            assert not lesson.cut_off(), f"at {width} pixels"
    assert not lab.take_faults()

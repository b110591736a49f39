"""The checks of this folder find what they are there to find."""

import nbformat
import pytest

from tests.browser import lab as lab_module

PLANTED = """\
from IPython.display import HTML, Javascript, display
from ipywidgets import HTML as Text, IntSlider, VBox
display(HTML('<img src="https://example.org/elsewhere.png">'))
display(Javascript('console.error("planted")'))
display(VBox([IntSlider(description="does nothing"), Text("stands still")]))
1 / 0"""


@pytest.fixture
def faulty(lab, course_copy):
    """A notebook in which everything is wrong that the checks are about, opened and run."""
    kernel = {"name": "python3", "display_name": "Python 3"}  # or JupyterLab asks for one
    cells = [nbformat.v4.new_code_cell(PLANTED)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, course_copy / "notebooks" / "faulty.ipynb")
    opened = lab.open((course_copy / "notebooks" / "faulty.ipynb").relative_to(course_copy))
    lab.run_all(opened)
    opened.read_through(1)
    yield opened
    lab.close_notebook()


def test_an_error_a_missing_picture_a_message_a_request_and_a_dead_control_are_found(faulty, lab, monkeypatch):
    assert faulty.errors() == ["ZeroDivisionError: division by zero"]
    assert faulty.cut_off() == faulty.without_alt_text() == ["picture 1"]
    faults = lab.take_faults()
    assert "request: https://example.org/elsewhere.png" in faults and "console: planted" in faults

    monkeypatch.setattr(lab_module, "REACTION", 2)
    (widget,) = faulty.widgets()
    (control,) = widget.controls
    with pytest.raises(AssertionError, match="waited 2 s for a change of the output"):
        widget.changes_with(widget.use_mouse, control)

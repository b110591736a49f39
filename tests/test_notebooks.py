"""The stored notebooks are what a run of today leaves. That their outputs are true is nbval's part of `make test`."""

import json
from pathlib import Path

import pytest

from course.doctor import LESSON_NEEDS, lesson_notebooks
from tools.hygiene import MAX_NOTEBOOK_BYTES, notebook_faults
from tools.run_tests import notebooks

ROOT = Path(__file__).resolve().parent.parent


def test_there_are_lessons():
    assert lesson_notebooks()


@pytest.mark.parametrize("path", notebooks(), ids=str)
def test_a_notebook_is_stored_as_it_ran(path):
    assert not notebook_faults(ROOT / path)


def test_the_doctor_knows_what_each_lesson_needs():
    numbers = {path.stem.split("_")[0] for path in lesson_notebooks()}
    assert numbers == set(LESSON_NEEDS)


def code_cell(source="print(1)", output="1\n", execution_count=1):
    stream = {"output_type": "stream", "name": "stdout", "text": [output]}
    return {
        "cell_type": "code",
        "id": "one",
        "metadata": {},
        "source": [source],
        "execution_count": execution_count,
        "outputs": [stream] if output else [],
    }


@pytest.fixture
def stored(tmp_path):
    """Stores cells as a notebook and returns its faults."""

    def faults_of(*cells):
        path = tmp_path / "lesson.ipynb"
        path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        return notebook_faults(path)

    return faults_of


def test_a_notebook_that_ran_has_no_fault(stored):
    prose = {"cell_type": "markdown", "id": "two", "metadata": {}, "source": ["Text."]}
    blank = code_cell(source="", output="", execution_count=None)
    assert stored(prose, code_cell(), blank) == []


def test_an_error_is_a_fault(stored):
    cell = code_cell()
    cell["outputs"].append({"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []})
    assert stored(cell) == ["cell 1 ends in an error"]


def test_a_stored_widget_is_a_fault_and_its_picture_is_none(stored):
    cell = code_cell()
    cell["outputs"].append({"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}})
    assert stored(cell) == []
    cell["outputs"][-1]["data"]["application/vnd.jupyter.widget-view+json"] = {"model_id": "0"}
    assert stored(cell) == ["cell 1 stores a widget's view, an error until it is run: `python -m tools.hygiene`"]


def test_a_text_in_pieces_is_a_fault(stored):
    cell = code_cell(output="Your dish is ")
    cell["outputs"].append({"output_type": "stream", "name": "stdout", "text": ["ramen.\n"]})
    assert stored(cell) == ["cell 1 stores what it printed in pieces: `python -m tools.hygiene`"]
    cell["outputs"][-1]["name"] = "stderr"
    assert stored(cell) == []


def test_a_cell_that_was_not_executed_is_a_fault(stored):
    assert stored(code_cell(), code_cell(output="", execution_count=None)) == ["cell 2 was not executed"]


def test_a_notebook_without_outputs_is_a_fault(stored):
    assert stored(code_cell(output="")) == ["no outputs: run it and save it"]


@pytest.mark.parametrize("path", ["/" + "home/ada/x.py", "/" + "work/main", "C:" + "\\Users\\ada"])
def test_a_machine_path_is_a_fault_in_an_output_and_in_a_source(stored, path):
    (in_output,) = stored(code_cell(output=f"Warning in {path}\n"))
    (in_source,) = stored(code_cell(source=f"open('{path}')"))
    assert in_output == in_source.replace("')", "") == f"cell 1 names a machine path: {path}"


def test_a_picture_is_not_searched_for_paths(stored):
    cell, encoded = code_cell(), "+/" + "tmp/abc"
    data = {"image/png": encoded, "text/html": f'<img alt="any" src="data:image/png;base64,{encoded}">'}
    cell["outputs"].append({"output_type": "display_data", "metadata": {}, "data": data})
    assert stored(cell) == []


def test_a_large_notebook_is_a_fault(stored):
    (fault,) = stored(code_cell(output="x" * MAX_NOTEBOOK_BYTES))
    assert f"more than {MAX_NOTEBOOK_BYTES}" in fault


def test_every_notebook_is_found_and_checkpoints_are_not(tmp_path):
    for name in ("notebooks/00_a.ipynb", "solutions/one/b.ipynb", "notebooks/.ipynb_checkpoints/00_a.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(map(str, notebooks(tmp_path))) == ["notebooks/00_a.ipynb", "solutions/one/b.ipynb"]

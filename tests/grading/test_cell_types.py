"""Key M, R or Y in JupyterLab, pressed by mistake on an answer: it counts as it was meant, and a remark says so."""

from __future__ import annotations

import pytest

from grading.grade import Result, grade
from grading.remote import Patience
from grading.submission import Submission, answered, choose, find_students, text_answer, to_run
from tests.grading.notebooks import FUNCTION, POINTS, RIGHT, grade_id, handed_in, needs_bubblewrap, save, unit

QUESTION, WORDS = "why-decode-waits", "Each key is read once and used once."


def submission(folder, notebook) -> Submission:
    save(notebook, folder / "ann" / "unit.ipynb")
    (student,) = find_students(folder)
    return choose(student, [unit()])[unit().name]


def turned(notebook, name: str, cell_type: str):
    """The notebook after the key: Jupyter takes the outputs away, and keeps the source and the metadata."""
    (cell,) = [cell for cell in notebook["cells"] if grade_id(cell) == name]
    cell["cell_type"] = cell_type
    for key in ("outputs", "execution_count"):
        cell.pop(key, None)
    return notebook


@needs_bubblewrap
def test_an_answer_that_became_markdown_earns_its_points(tmp_path):
    handed = submission(tmp_path, turned(handed_in(RIGHT), FUNCTION, "markdown"))
    result = grade(Result("ann", "ann", unit().name), unit(), handed, 1, Patience(60))
    assert sum(verdict.points or 0 for verdict in result.verdicts) == POINTS
    assert result.remarks == [
        "unit.ipynb: the answer cell gqa_attention (cell 6) is Markdown: graded as code; the key Y makes it code again"
    ]


@pytest.mark.parametrize("kept", ["metadata", "the id alone"])
@pytest.mark.parametrize("cell_type", ["markdown", "raw"])
def test_an_answer_of_another_type_is_run_as_code(tmp_path, cell_type, kept):
    notebook = turned(handed_in(RIGHT), FUNCTION, cell_type)
    if kept == "the id alone":
        for cell in notebook["cells"]:
            cell["metadata"] = {}
    handed = submission(tmp_path, notebook)
    assert handed.file and answered(handed.file, unit()) == [FUNCTION]
    assert RIGHT in [cell.source for cell in to_run(handed.file, unit())]
    assert len(handed.remarks) == 1 and f"is {cell_type.title()}: graded as code" in handed.remarks[0]


def test_an_answer_in_words_that_became_code_is_read_and_not_run(tmp_path):
    notebook = turned(handed_in(RIGHT), QUESTION, "code")
    next(cell for cell in notebook["cells"] if grade_id(cell) == QUESTION)["source"] = WORDS
    handed = submission(tmp_path, notebook)
    assert handed.file and text_answer(handed.file, unit().texts[0], unit()) == WORDS
    assert WORDS not in [cell.source for cell in to_run(handed.file, unit())]
    assert "is Code: read as text" in handed.remarks[0]


def test_other_cells_keep_their_type_and_an_unanswered_one_leaves_no_remark(tmp_path):
    placeholder = next(
        cell.source for cell in unit().release.cells if cell.metadata.get("nbgrader", {}).get("solution")
    )
    notebook = turned(handed_in(placeholder), FUNCTION, "raw")
    notebook["cells"].append({"cell_type": "raw", "metadata": {}, "source": "x = 1 / 0"})
    handed = submission(tmp_path, notebook)
    assert handed.file and to_run(handed.file, unit()) == [] and handed.remarks == ()


def test_a_merge_conflict_is_named(tmp_path):
    (tmp_path / "ann").mkdir()
    text = '{\n<<<<<<< HEAD\n "cells": [],\n=======\n "cells": [1],\n>>>>>>> theirs\n "nbformat": 4\n}\n'
    (tmp_path / "ann" / "unit.ipynb").write_text(text)
    (student,) = find_students(tmp_path)
    assert student.files[0].problem == "holds the marks of a merge conflict (<<<<<<<): merge it, and send it again"

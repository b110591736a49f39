"""Feedback for a student: the released notebook with the student's answers, the verdicts and the scores.

It is made from the released notebook, so that the code of hidden tests cannot be in it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode, v4

from grading.grade import MAX_ANSWER, Result, Verdict
from grading.remote import plain
from grading.unit import Unit, grade_id, is_answer, is_test, is_text

SHOWN = 50_000  # characters of a student's cells and outputs: highlighting a million takes minutes


def annotated(unit: Unit, result: Result) -> NotebookNode:
    """The released notebook with a student's answers, helper cells, outputs, verdicts and scores.

    The metadata are nbgrader's. What the student wrote is shown as text: no active HTML, no escape codes.
    """
    verdicts = {verdict.grade_id: verdict for verdict in result.verdicts}
    own = {cell["number"]: cell for cell in _cut(result.cells)}
    places = _places(unit, result)
    notebook = nbformat.from_dict(unit.release)
    notebook.cells = [_head(result)]
    for released in unit.release.cells:
        if released.metadata.get("jupyter", {}).get("source_hidden"):
            continue  # it fetches the course on Colab
        cell = v4.new_code_cell(released.source) if released.cell_type == "code" else v4.new_markdown_cell()
        cell.update(source=released.source, metadata=nbformat.from_dict(released.metadata), id=released.id)
        if is_answer(released):
            number = places[grade_id(released)]
            notebook.cells += [_code(own.pop(n)) for n in sorted(own) if number is not None and n < number]
            if number is not None and number in own:
                answer = _code(own.pop(number))
                cell.source, cell.outputs = answer.source, answer.outputs
        elif is_text(released):
            cell.source = _harmless(result.answers.get(grade_id(released))) or released.source
        if is_test(released) or is_text(released):
            _score(cell, verdicts.get(grade_id(released)))
        if comment := result.comments.get(grade_id(released)):
            cell.metadata.nbgrader["comment"] = comment
        notebook.cells.append(cell)
    notebook.cells += [_code(own[number]) for number in sorted(own)]
    return notebook


def to_html(notebook: NotebookNode, result: Result) -> str:
    """The page for the student, in nbgrader's form."""
    scores = {"score": result.total, "max_score": result.maximum, "late_penalty": 0}
    title = html.escape(f"{result.unit} · {result.student}")
    body, _ = _exporter().from_notebook_node(notebook, {"nbgrader": scores | {"notebook": title}})
    return body


@cache
def _exporter() -> Any:
    import nbgrader
    from nbconvert.exporters import HTMLExporter

    form = Path(nbgrader.__file__).parent / "server_extensions" / "formgrader"
    return HTMLExporter(
        template_name="feedback",
        extra_template_basedirs=[str(form / "templates")],
        extra_template_paths=[str(form / "static" / "node_modules" / "bootstrap" / "dist" / "css")],
    )


def _cut(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cells, their code and output cut to `SHOWN` characters in all."""
    left = SHOWN
    for cell in cells:
        texts = {}
        for name in ("source", "output", "error"):
            texts[name] = plain(cell[name], left)
            left = max(0, left - len(texts[name]))
        yield cell | texts


def _places(unit: Unit, result: Result) -> dict[str, int | None]:
    """For each answer cell as handed out, the number of the student's cell that was judged in its place."""
    judged = {test.grade_id: test.functions for test in unit.tests}
    cells = {
        name: verdict.cell
        for verdict in result.verdicts
        for name in judged.get(verdict.grade_id, ())
        if verdict.cell is not None
    }
    return {
        grade_id(cell): next((cells[name] for name in unit.defined_in(cell) if name in cells), None)
        for cell in unit.release.cells
        if is_answer(cell)
    }


def _head(result: Result) -> NotebookNode:
    lines = [f"Graded {result.date}, from the file {result.file}."] if result.file else []
    lines += [f"- {remark}" for remark in result.remarks]
    text = re.sub(r"([!-,./:-@[-`{-~])", r"\\\1", "\n".join(lines))  # Markdown in a file's name is escaped
    return v4.new_markdown_cell(html.escape(text.replace("\\<", "<"), quote=False), id="remarks")


def _code(own: dict[str, Any]) -> NotebookNode:
    cell = v4.new_code_cell(own["source"], id=f"own-{own['number']}")
    cell.outputs = [_printed(text) for text in (own["output"], own["error"]) if text]
    return cell


def _harmless(markdown: str | None) -> str:
    """Markdown without active HTML and without links: nbconvert makes one of `[x](javascript:…)` too."""
    from nbconvert.preprocessors.sanitize import SanitizeHTML

    return re.sub(r"\](?=[(:])", "] ", SanitizeHTML().sanitize_html_tags(plain(markdown, MAX_ANSWER)))


def _printed(text: str) -> NotebookNode:
    return v4.new_output("stream", name="stdout", text=text.rstrip("\n") + "\n")


def _score(cell: NotebookNode, verdict: Verdict | None) -> None:
    if verdict is None:
        return
    cell.metadata.nbgrader |= {"score": verdict.points or 0, "points": verdict.maximum}
    if cell.cell_type == "code":
        cell.outputs = [_printed(verdict.message)]
    else:
        cell.metadata.nbgrader["comment"] = verdict.message

"""Cells whose type was changed: key M or R in JupyterLab makes Markdown or Raw of a cell, and Y makes code.

A cell that nbgrader's metadata mark as an answer gets back the type that it was handed out with, as nbgrader's own
`OverwriteCells` does; so does a cell with the id of such a cell, for some tools keep only that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from grading.unit import Unit, grade_id, is_answer, is_text

if TYPE_CHECKING:
    from grading.submission import Cell, File

SHOWN = {"code": "Code", "markdown": "Markdown", "raw": "Raw"}


def turned_back(file: File, unit: Unit) -> File:
    """The notebook with each answer cell in the type that it was handed out with; what changed is in its remarks."""
    handed_out = {grade_id(cell): cell for cell in unit.release.cells if is_answer(cell) or is_text(cell)}
    by_id = {cell.id: name for name, cell in handed_out.items() if "id" in cell}
    cells, remarks = [], []
    for cell in file.cells:
        name = cell.grade_id or by_id.get(cell.id, "")
        if name in handed_out and cell.kind != handed_out[name].cell_type:
            cell, was = replace(cell, kind=handed_out[name].cell_type), cell
            if cell.source.strip() not in ("", handed_out[name].source.strip()):
                remarks.append(_remark(file, was, name, cell.kind))
        cells.append(cell)
    return replace(file, cells=tuple(cells), remarks=tuple(remarks))


def _remark(file: File, was: Cell, name: str, kind: str) -> str:
    now = "graded as code; the key Y makes it code again" if kind == "code" else "read as text; the key M makes it text"
    return f"{file.name}: the answer cell {name} (cell {was.number + 1}) is {SHOWN[was.kind]}: {now}"

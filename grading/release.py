"""`make exercises`: the student's notebooks, made from `solutions/` with nbgrader's own steps.

The same as `nbgrader generate_assignment --no-db` makes, and a tag more: a check that says "not yet" does not stop
Run All. Needs nbgrader, as instructors and contributors have it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from grading import ROOT

SOURCE, RELEASE = "solutions", "exercises"


def main() -> None:
    made = {path.name: release(nbformat.read(path, as_version=4)) for path in notebooks(ROOT / SOURCE)}
    for path in notebooks(ROOT / RELEASE):
        if path.name not in made:
            shutil.rmtree(path.parent)  # its solution is gone
    for name, notebook in made.items():
        target = ROOT / RELEASE / Path(name).stem / name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
        print(target.relative_to(ROOT))


def notebooks(folder: Path) -> list[Path]:
    """The notebooks of the units in a folder: unit.ipynb in a folder unit, for each."""
    return sorted(path for path in folder.glob("*/*.ipynb") if path.parent.name == path.stem)


def release(notebook: NotebookNode) -> NotebookNode:
    """A solution as the students get it: no answers, no hidden tests, no outputs.

    Raises:
        ValueError, RuntimeError: from nbgrader, where a cell's metadata is not right.
    """
    from nbgrader import preprocessors

    steps = [
        preprocessors.LockCells,
        preprocessors.ClearSolutions,
        preprocessors.ClearOutput,
        preprocessors.CheckCellMetadata,
        preprocessors.ClearHiddenTests,
        preprocessors.ClearMarkScheme,
        preprocessors.ComputeChecksums,
        preprocessors.CheckCellMetadata,
    ]
    for step in steps:
        notebook, _ = step().preprocess(notebook, {"nbgrader": {}})
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.startswith("check("):
            cell.metadata.tags = ["raises-exception"]
    return notebook


if __name__ == "__main__":
    main()

"""Runs the cells of a lesson that are tagged `gpu` as plain Python, so that the GPU machine needs no Jupyter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.machine import ROOT


def notebooks_with_gpu_cells() -> list[Path]:
    """The lessons that have a cell tagged `gpu`."""
    return [path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")) if gpu_cells(path)]


def gpu_cells(path: Path) -> list[str]:
    """The sources of a notebook's cells that are tagged `gpu`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if "gpu" in cell["metadata"].get("tags", [])]


def run(path: Path) -> None:
    """Executes the tagged cells in order, in one namespace; they import all that they use."""
    namespace: dict = {"__name__": path.stem}
    for number, source in enumerate(gpu_cells(path), start=1):
        exec(compile(source, f"{path.name}, GPU cell {number}", "exec"), namespace)


if __name__ == "__main__":
    run(Path(sys.argv[1]))

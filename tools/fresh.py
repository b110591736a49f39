"""`make lab FRESH=1`: copies of the lessons without outputs, in a folder of your own, to read with nothing given away.

A copy that is there already is yours and stays as it is; delete it to begin a lesson anew.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor

from tools.run_tests import ROOT

FOLDER = "my_lessons"


def main() -> None:
    made = copy_lessons(ROOT)
    print(f"{FOLDER}/: {', '.join(path.name for path in made) or 'all lessons are there already'}")


def copy_lessons(root: Path) -> list[Path]:
    """Writes `my_lessons/` beside `notebooks/`, so that the links between lessons and exercises hold.

    Returns:
        The copies that were not there yet.
    """
    made = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        copy = root / FOLDER / path.name
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            part = copy.with_suffix(".part")  # a crash leaves no half of a lesson, which would stay
            notebook, _ = ClearOutputPreprocessor().preprocess(nbformat.read(path, as_version=4), {})
            nbformat.write(notebook, part)
            part.replace(copy)
            made.append(copy)
    return made


if __name__ == "__main__":
    main()

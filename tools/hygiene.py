"""Finds what must not be stored in the repository: paths of one machine, and notebooks that were edited or cut."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.run_tests import ROOT, notebooks

MAX_NOTEBOOK_BYTES = 400_000
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# The home and scratch folders of Linux and macOS, and a Windows drive.
MACHINE_PATH = re.compile(
    r"(?<![\w.-])/(?:home|root|work|Users|tmp|private/var|var/folders)/[\w.]|\b[A-Z]:\\{1,2}(?:Users|Temp|Windows)\b"
)

ENCODED_PICTURE = re.compile(r"data:image/\w+;base64,[\w+/=]+")


def machine_paths(text: str) -> list[str]:
    """The paths in a text that exist on one machine only, each with what follows it."""
    return [text[match.start() : match.end() + 20].split()[0] for match in MACHINE_PATH.finditer(text)]


def notebook_faults(path: Path) -> list[str]:
    """Why a notebook may not be stored like this; an empty list when it may.

    Args:
        path: a notebook that is stored with its outputs.

    Returns:
        One line for each fault, with the cell it is in, counted from 1.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = list(enumerate(notebook["cells"], start=1))
    code = [(number, cell) for number, cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    faults = []
    if path.stat().st_size > MAX_NOTEBOOK_BYTES:
        faults.append(f"{path.stat().st_size} bytes, more than {MAX_NOTEBOOK_BYTES}: use SVG or smaller pictures")
    if not any(cell["outputs"] for _, cell in code):
        faults.append("no outputs: run it and save it")
    for number, cell in code:
        if cell["execution_count"] is None:
            faults.append(f"cell {number} was not executed")
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            faults.append(f"cell {number} ends in an error")
        if any(WIDGET_VIEW in output.get("data", {}) for output in cell["outputs"]):
            faults.append(f"cell {number} stores a widget's view, an error until it is run: `python -m tools.hygiene`")
        if in_one_piece(cell["outputs"]) != cell["outputs"]:
            faults.append(f"cell {number} stores what it printed in pieces: `python -m tools.hygiene`")
    for number, cell in cells:
        paths = [path for text in texts(cell) for path in machine_paths(text)]
        faults += [f"cell {number} names a machine path: {path}" for path in paths]
    return faults


def in_one_piece(outputs: list[dict]) -> list[dict]:
    """Outputs in which what was printed piece by piece is one text: on a page, each piece would be a paragraph."""
    merged: list[dict] = []
    for output in outputs:
        if merged and output["output_type"] == "stream" and merged[-1].get("name") == output["name"]:
            text = "".join([*merged[-1]["text"], *output["text"]])
            merged[-1] = {**output, "text": text.splitlines(keepends=True)}
        else:
            merged.append(output)
    return merged


def texts(value: object) -> Iterator[str]:
    """Every piece of text inside a cell, but for encoded pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and all(isinstance(line, str) for line in value):
        yield "".join(value)  # how a notebook stores a text of several lines
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not name.startswith("image/") or name == "image/svg+xml":
                yield from (ENCODED_PICTURE.sub("", text) for text in texts(item))


def repository_files(root: Path) -> list[Path]:
    """The files of a git checkout, with those that are new and not ignored: what a commit would hold."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return [root / name for name in names if (root / name).is_file()]


def main() -> None:
    """`python -m tools.hygiene`: stored notebooks lose their widgets' views, not the pictures; a text is one piece."""
    for path in (ROOT / name for name in notebooks()):
        before = path.read_text(encoding="utf-8")
        notebook = json.loads(before)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = in_one_piece(cell["outputs"])
                for output in cell["outputs"]:
                    output.get("data", {}).pop(WIDGET_VIEW, None)
        after = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.name}: cleaned")


if __name__ == "__main__":
    main()

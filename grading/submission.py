"""Reads a student's folder: which of its files belongs to which unit, and its cells.

Nothing in the folder is trusted: links are not followed, special files are not opened, names and texts are made
harmless before they are shown. A file that cannot be read leaves a remark that says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grading.cell_types import turned_back
from grading.remote import plain
from grading.unit import Text, Unit, form

MAX_FILE = 32 << 20  # bytes
MAX_SOURCE = 3 << 20  # characters of all cells together
MAX_CELLS = 2000
MAX_ENTRIES = 2000  # files and folders of a student
MAX_DEPTH = 8
SUFFIXES = (".ipynb", ".json", ".txt", "")


@dataclass(frozen=True)
class Cell:
    """A cell of a submitted notebook.

    Attributes:
        number: its place in the notebook, from 0.
        kind: "code", "raw", or else "markdown".
        id, grade_id: "" where it has none.
    """

    number: int
    kind: str
    source: str
    id: str = ""
    grade_id: str = ""


@dataclass(frozen=True)
class File:
    """A file of a submission.

    Attributes:
        name: its path in the student's folder, harmless to show.
        problem: why it cannot be graded; None for a notebook that was read.
        hash: of its bytes.
        modified: when it was, in ns.
        remarks: what was mended in it, by `grading.cell_types`.
    """

    name: str
    cells: tuple[Cell, ...] = ()
    problem: str | None = None
    hash: str = ""
    modified: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submission:
    """What a student handed in for one unit.

    Attributes:
        file: the notebook to grade; None where there is none.
        remarks: for the student and the instructor: what was left out, and why.
        key: changes whenever one of the files or the remarks does.
        unread: whether there is none, and something else was handed in that could not be read.
    """

    file: File | None
    remarks: tuple[str, ...] = ()
    key: str = ""
    unread: bool = False


@dataclass(frozen=True)
class Student:
    """A student's folder.

    Attributes:
        name: of the folder, harmless to show.
        slug: harmless as a path and as an id.
    """

    name: str
    slug: str
    files: list[File] = field(default_factory=list)


def find_students(folder: Path) -> Iterator[Student]:
    """A student for each folder in it; a link to a folder counts as one without files.

    Raises:
        OSError: the folder cannot be read.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") and not entry.name.startswith(".."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield Student(shown(entry.name), slug(entry.name), read_folder(Path(entry.path)))
        elif entry.is_symlink():
            problem = File(shown(entry.name), problem="the student's folder is a link, and links are not followed")
            yield Student(shown(entry.name), slug(entry.name), [problem])


def shown(name: str, limit: int = 100) -> str:
    """A file's or a folder's name on one line, without escape codes."""
    return plain(os.fsencode(name).decode(errors="replace").replace("\n", "�").replace("\t", "�"), limit)


def slug(name: str) -> str:
    """A name as one part of a path: letters, digits, `_` and `-`; two names never share one."""
    kept = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60]
    if kept == name and not name.startswith("-"):
        return kept
    return f"{kept.strip('_-') or 'student'}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def read_folder(folder: Path) -> list[File]:
    """Every file in a student's folder that could be a notebook."""
    found: list[File] = []
    for count, (entry, path) in enumerate(_walk(folder, "", 0)):
        if count >= MAX_ENTRIES:
            return [*found, File("…", problem=f"more than {MAX_ENTRIES} files and folders: the rest was not looked at")]
        if isinstance(entry, File):
            found.append(entry)
        elif entry.is_dir(follow_symlinks=False):
            continue
        elif Path(entry.name).suffix.lower() in SUFFIXES or ".ipynb" in entry.name.lower():
            found.append(read_file(Path(entry.path), shown(path)))
    return found


def _walk(folder: Path, path: str, depth: int) -> Iterator[tuple[os.DirEntry | File, str]]:
    """Files and folders with their paths; for a folder that cannot be read, a `File` that says so."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(itertools.islice(found, MAX_ENTRIES + 1), key=lambda entry: entry.name)
    except OSError as error:
        yield File(shown(path) or "the folder", problem=f"cannot be read: {error.strerror}"), path
        return
    for entry in entries:
        below = f"{path}{entry.name}"
        if entry.name in (".ipynb_checkpoints", "__MACOSX", ".git") or entry.name.startswith("._"):
            continue
        yield entry, below
        if entry.is_dir(follow_symlinks=False) and depth < MAX_DEPTH:
            yield from _walk(Path(entry.path), below + "/", depth + 1)


def read_file(path: Path, name: str) -> File:
    """A file as a notebook, or what is wrong with it."""
    try:
        content, modified = _bytes(path)
        cells = tuple(_cells(_json(content)))
    except _Problem as problem:
        return File(name, problem=str(problem))
    except OSError as error:
        return File(name, problem=f"cannot be read: {error.strerror}")
    if sum(len(cell.source) for cell in cells) > MAX_SOURCE:
        return File(name, problem=f"more than {MAX_SOURCE:,} characters in its cells")
    return File(name, cells, hash=hashlib.sha256(content).hexdigest(), modified=modified)


class _Problem(Exception):
    """What is wrong with a file, as a sentence without its subject."""


def _bytes(path: Path) -> tuple[bytes, int]:
    if path.is_symlink():
        raise _Problem("is a link, and links are not followed: send the file itself")
    # Not blocking: a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Problem("is no ordinary file")
        if status.st_size > MAX_FILE:
            raise _Problem(
                f"is too large ({status.st_size / 2**20:.0f} MiB, at most {MAX_FILE >> 20}): "
                "clear the outputs of its cells, save it, and send it again"
            )
        return file.read(MAX_FILE + 1), status.st_mtime_ns


def _json(content: bytes) -> Any:
    if not content.strip(b"\0 \r\n\t\xef\xbb\xbf"):
        raise _Problem("is empty")
    try:
        return json.loads(_text(content), strict=False)
    except (ValueError, RecursionError) as error:
        if re.search(rb"^\s*<{7} ", content, re.MULTILINE):
            raise _Problem("holds the marks of a merge conflict (<<<<<<<): merge it, and send it again") from None
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise _Problem(f"is no notebook: its JSON is broken{where}; save it in Jupyter and send it again") from None


def _text(content: bytes) -> str:
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"}
    marks |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"{\0": "utf-16-le", b"\0{": "utf-16-be"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _cells(notebook: Any) -> Iterator[Cell]:
    """The cells of a notebook in format 4 or an older one; entries of another form are left out."""
    if not isinstance(notebook, dict):
        raise _Problem("is no notebook: its JSON is not an object")
    sheets = notebook.get("worksheets")
    if isinstance(sheets, list):
        found = [cell for sheet in sheets if isinstance(sheet, dict) for cell in _list(sheet.get("cells"))]
    elif isinstance(notebook.get("cells"), list):
        found = notebook["cells"]
    else:
        raise _Problem("is no notebook: it has no cells")
    if len(found) > MAX_CELLS:
        raise _Problem(f"has more than {MAX_CELLS} cells")
    for number, cell in enumerate(found):
        if isinstance(cell, dict):
            metadata = cell.get("metadata")
            nbgrader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
            grade_id = nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None
            kind = cell["cell_type"] if cell.get("cell_type") in ("code", "raw") else "markdown"
            source = _joined(cell.get("source", cell.get("input")))
            yield Cell(number, kind, source, _word(cell.get("id")), _word(grade_id))


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _word(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= 100 else ""


def _joined(source: Any) -> str:
    parts = source if isinstance(source, list) else [source]
    text = "".join(part for part in parts if isinstance(part, str))
    return text.encode(errors="replace").decode().replace("\r\n", "\n")  # lone surrogates cannot be sent


def choose(student: Student, units: list[Unit]) -> dict[str, Submission]:
    """For each unit the file to grade, chosen by the content of the files, not by their names."""
    notebooks = [file for file in student.files if file.problem is None]
    own = {file.name: _unit_of(file, units) for file in notebooks}
    unread = [f"{file.name}: {file.problem}" for file in student.files if file.problem]
    unread += [f"{name}: no notebook of this course" for name, unit in own.items() if unit is None]
    result = {}
    for unit in units:
        files = [file for file in notebooks if own[file.name] == unit.name]
        files = [turned_back(file, unit) for file in files or notebooks]
        files = [file for file in files if own[file.name] == unit.name or answered(file, unit)]
        files.sort(key=lambda file: (-len(answered(file, unit)), -file.modified, file.name))
        remarks = [f"{file.name}: left out, for {files[0].name} is the fuller or the newer one" for file in files[1:]]
        remarks += [line for line in unread if not files or unit.name in line]
        remarks += files[0].remarks if files else ()
        others = [f"{name}: a notebook of {other}" for name, other in own.items() if other and not files]
        result[unit.name] = _submission(files, remarks, others)
    return result


def _submission(files: list[File], remarks: list[str], others: list[str]) -> Submission:
    unread = bool(remarks) and not files
    if not files:
        remarks = ["no notebook of this unit was found", *remarks, *others]
    hashes = [f"{file.name} {file.hash}" for file in files]
    return Submission(
        files[0] if files else None,
        tuple(remarks),
        hashlib.sha256("\n".join([*hashes, *remarks]).encode()).hexdigest(),
        unread,
    )


def _unit_of(file: File, units: list[Unit]) -> str | None:
    """The unit that a notebook belongs to: by its grade ids, then its cells' ids, then the functions in it."""

    def evidence(unit: Unit) -> tuple[int, int, int, bool]:
        grade_ids = len({cell.grade_id for cell in file.cells} & unit.grade_ids)
        ids = len({cell.id for cell in file.cells} & unit.cell_ids)
        functions = sum(defines(cell.source, name) for name in unit.functions for cell in file.cells)
        return grade_ids, ids, functions, unit.name in file.name

    best = max(units, key=evidence)
    return best.name if any(evidence(best)[:3]) else None


def defines(source: str, name: str) -> bool:
    """Whether a cell seems to bind a function's name; the cell need not be valid Python."""
    return bool(re.search(rf"^(async\s+)?(def\s+{name}\b|class\s+{name}\b|{name}\s*=(?!=))", source, re.MULTILINE))


def answered(file: File, unit: Unit) -> list[str]:
    """The functions that a notebook defines, other than as they were handed out, and the questions it answers."""
    own = [cell.source for cell in to_run(file, unit)]
    texts = [text.grade_id for text in unit.texts if text_answer(file, text, unit)]
    return [name for name in unit.functions if any(defines(source, name) for source in own)] + texts


def to_run(file: File, unit: Unit) -> list[Cell]:
    """The code cells of the student, without those that are as they were handed out."""
    handed_out = unit.placeholders | {form(source) for source in unit.setup(unit.release)}
    cells = [cell for cell in file.cells if cell.kind == "code" and cell.source.strip()]
    with warnings.catch_warnings():  # parsing "\d" warns
        warnings.simplefilter("ignore")
        return [cell for cell in cells if form(cell.source) not in handed_out]


def text_answer(file: File, text: Text, unit: Unit) -> str:
    """A student's answer to a question in text; "" where it is not answered."""
    found = next(_places(file, text, unit), None)
    answer = found.source.strip() if found else ""
    return "" if answer == text.placeholder.strip() else answer


def _places(file: File, text: Text, unit: Unit) -> Iterator[Cell]:
    """The cells that may hold the answer, the most certain first."""

    def changed(cells: Iterable[Cell]) -> Iterator[Cell]:
        return (cell for cell in cells if cell.source.strip() not in ("", text.placeholder.strip()))

    ids = {cell.id for cell in unit.release.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == text.grade_id}
    yield from changed(cell for cell in file.cells if cell.grade_id == text.grade_id)
    yield from changed(cell for cell in file.cells if cell.id and cell.id in ids)
    released = {cell.source.strip() for cell in unit.release.cells}
    after_prompt = False
    for cell in file.cells:
        if after_prompt and cell.source.strip() and cell.source.strip() not in released:
            yield cell
        after_prompt = cell.source.strip() == text.prompt.strip() or (
            after_prompt and cell.source.strip() in ("", text.placeholder.strip())
        )

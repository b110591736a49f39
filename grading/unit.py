"""A unit as the grader needs it: the questions, tests and points of its solution notebook."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from grading import ROOT
from grading.release import SOURCE, notebooks, release

MAX_PARSED = 8000  # characters of a cell: the time that Python takes for a long f-string grows with its square


@dataclass(frozen=True)
class Test:
    """A test cell, with the hidden tests in it: its points are earned when it raises nothing."""

    __test__ = False  # pytest looks for classes of this name

    grade_id: str
    points: float
    source: str
    functions: tuple[str, ...]  # of the answers, those that it names


@dataclass(frozen=True)
class Text:
    """A question that is answered in text and graded by hand."""

    grade_id: str
    points: float
    placeholder: str
    prompt: str  # the cell above it


class Unit:
    """A unit of `solutions/`.

    Attributes:
        name: its folder's.
        solution, release: the notebooks, with and without answers.
        functions: that the students write, in order.
    """

    def __init__(self, path: Path):
        self.name = path.parent.name
        self.solution = nbformat.read(path, as_version=4)
        self.release: NotebookNode = release(nbformat.read(path, as_version=4))
        self.hash = hashlib.sha256(path.read_bytes()).hexdigest()
        answers = [cell for cell in self.solution.cells if is_answer(cell)]
        tested = set().union(*(_names(cell.source) for cell in self.solution.cells if is_test(cell)))
        self._defined = {
            grade_id(cell): [name for name in _definitions(cell.source) if name in tested] for cell in answers
        }
        self.functions = [name for names in self._defined.values() for name in names]

    @cached_property
    def tests(self) -> list[Test]:
        """The test cells of the solution."""
        cells = [cell for cell in self.solution.cells if is_test(cell)]
        return [Test(grade_id(cell), points(cell), cell.source, self._functions_in(cell.source)) for cell in cells]

    @cached_property
    def texts(self) -> list[Text]:
        """The cells for answers in words, each with what stands above it."""
        found, above = [], ""
        for cell in self.release.cells:
            if is_text(cell):
                found.append(Text(grade_id(cell), points(cell), cell.source, above))
            above = cell.source
        return found

    @cached_property
    def grade_ids(self) -> set[str]:
        """The grade ids of the solution."""
        return {grade_id(cell) for cell in self.solution.cells} - {""}

    @cached_property
    def cell_ids(self) -> set[str]:
        """The ids of the released cells."""
        return {cell.id for cell in self.release.cells if "id" in cell}

    @cached_property
    def placeholders(self) -> set[str]:
        """The answers as they are handed out, and the cells that are only there to test them, without their form."""
        return {form(cell.source) for cell in self.release.cells if is_answer(cell) or self._uses_answers(cell)}

    @property
    def items(self) -> list[Test | Text]:
        """Everything that gives points."""
        return [*self.tests, *self.texts]

    @property
    def maximum(self) -> float:
        """The points of the unit."""
        return sum(item.points for item in self.items)

    def defined_in(self, answer: NotebookNode) -> list[str]:
        """The functions that an answer cell defines."""
        return self._defined[grade_id(answer)]

    def setup(self, notebook: NotebookNode) -> list[str]:
        """The code of the solution or the release that does not depend on the answers: imports, helpers."""
        ordinary = (cell for cell in notebook.cells if cell.cell_type == "code" and not grade_id(cell))
        return [cell.source for cell in ordinary if not self._uses_answers(cell)]

    def _uses_answers(self, cell: NotebookNode) -> bool:
        return cell.cell_type == "code" and bool(self._functions_in(cell.source))

    def _functions_in(self, source: str) -> tuple[str, ...]:
        names = _names(source)
        return tuple(name for name in self.functions if name in names)


def find_units(root: Path = ROOT, only: str = "") -> list[Unit]:
    """The units of `solutions/`, or the one whose folder's name begins so.

    Raises:
        ValueError: there is none.
    """
    paths = notebooks(root / SOURCE)
    chosen = [path for path in paths if path.stem.startswith(only)]
    if not chosen:
        raise ValueError(f"UNIT={only} is no unit: one of {', '.join(path.stem for path in paths) or '(none)'}")
    return [Unit(path) for path in chosen]


def is_answer(cell: NotebookNode) -> bool:
    """Whether a student writes code in this cell."""
    return cell.cell_type == "code" and _flag(cell, "solution")


def is_test(cell: NotebookNode) -> bool:
    """Whether the cell gives points by running assertions."""
    return cell.cell_type == "code" and _flag(cell, "grade") and not _flag(cell, "solution")


def is_text(cell: NotebookNode) -> bool:
    """Whether a student writes prose in this cell, which a person grades."""
    return cell.cell_type == "markdown" and _flag(cell, "grade") and _flag(cell, "solution")


def grade_id(cell: NotebookNode) -> str:
    """nbgrader's id of a cell, empty where it has none."""
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def points(cell: NotebookNode) -> float:
    """The points that a graded cell is worth."""
    return float(cell.metadata.nbgrader.points)


@lru_cache(maxsize=4096)
def form(source: str) -> str:
    """A source in a form that ignores comments, blank lines and layout; of a long one, blank lines only."""
    try:
        if len(source) <= MAX_PARSED:
            return ast.dump(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    return "\n".join(line.strip() for line in source.splitlines() if line.strip())


def _flag(cell: NotebookNode, name: str) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get(name))


def _names(source: str) -> set[str]:
    try:
        return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    except SyntaxError:  # a magic
        return set()


def _definitions(source: str) -> list[str]:
    return [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]

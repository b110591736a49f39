"""Answers to the exercises, right and wrong: one file for each task, named after it."""

from __future__ import annotations

import importlib
import inspect
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import nbformat
import torch

from tools.run_tests import ROOT
from course.tasks import TASKS, Task

REFERENCE = "reference"


@dataclass(frozen=True)
class Wrong:
    """A wrong answer.

    Args:
        name: what is wrong with it.
        function: the answer.
        told: what its author must be told, a part of it.
        kept: whether it was written to fail in the last part of its task only: in what it moves or needs.
    """

    name: str
    function: Callable
    told: str
    kept: bool = False


def changed(right: Callable, old: str, new: str, *, name: str, told: str, kept: bool = False) -> Wrong:
    """A right answer with one slip: some words in its source are others."""
    source = inspect.getsource(right)
    assert source.count(old) >= 1, f"{right.__name__} has no {old!r}"
    return Wrong(name, defined(source.replace(old, new), right.__name__), told, kept)


def defined(source: str, name: str) -> Callable:
    """The function that a source defines, where only torch and math are at hand."""
    namespace: dict = {"torch": torch, "math": importlib.import_module("math")}
    if "@triton.jit" in source:
        namespace |= vars(importlib.import_module("course.tasks.triton_programs"))
    file = f"<{name} {len(linecache.cache)}>"  # Triton reads a kernel's source again, under its file's name
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


@cache
def solution(unit: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "solutions" / unit / f"{unit}.ipynb", as_version=4)


def answer_cell(task: Task) -> nbformat.NotebookNode:
    return next(cell for cell in solution(task.unit).cells if grade_id(cell) == task.name)


def graded_cells(task: Task) -> dict[str, nbformat.NotebookNode]:
    """A task's graded cells, by the part of the task."""
    begin = f"{task.name}-"
    return {
        grade_id(cell).removeprefix(begin): cell
        for cell in solution(task.unit).cells
        if grade_id(cell).startswith(begin) and cell.metadata.nbgrader.grade
    }


def grade_id(cell: nbformat.NotebookNode) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def right_answers(task: Task) -> dict[str, Callable]:
    """The reference from the solution, and those that are written in another way."""
    return {REFERENCE: defined(answer_cell(task).source, task.name)} | answers(task).RIGHT


def wrong_answers(task: Task) -> list[Wrong]:
    return answers(task).WRONG


def answers(task: Task) -> ModuleType:
    return importlib.import_module(f"tests.exercises.{task.name}")


def tasks_with_answers() -> list[Task]:
    """The tasks that have a file here; that all have one is a test of its own."""
    return [task for task in TASKS.values() if Path(__file__).with_name(f"{task.name}.py").exists()]

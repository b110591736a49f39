"""A task, its cases, and the verdict on an answer."""

from __future__ import annotations

import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

WIDTH = 96  # characters beside JupyterLab's file browser


class NotYet(AssertionError):
    """An answer that is not right yet. Jupyter shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class NotBegun(NotYet):
    """There is no answer yet, so that one line says all."""


class Case(NamedTuple):
    """One situation in which an answer is tried.

    Args:
        title: the situation in a few words, such as "1 query, 9 keys".
        judge: called with the answer and a generator for its inputs; raises NotYet where the answer is wrong.
    """

    title: str
    judge: Callable[[Callable, torch.Generator], None]


@dataclass(frozen=True)
class Task:
    """What a learner is asked to write.

    Args:
        name: of the function.
        unit: the folder in `solutions/` and `exercises/`.
        minutes: that it takes.
        difficulty: 1 to 5.
        parts: the public cases, by what they are about.
        model_answer: of a writing stop, the few lines that a lesson asks for before it shows how the package does it.
            An exercise has its answer in `solutions/`.
    """

    name: str
    unit: str
    minutes: int
    difficulty: int
    parts: dict[str, list[Case]]
    model_answer: Callable | None = None

    def cases(self, part: str | None = None) -> list[Case]:
        """The cases of a part, or of all.

        Raises:
            ValueError: there is no such part.
        """
        if part is None:
            return [case for cases in self.parts.values() for case in cases]
        if part not in self.parts:
            raise ValueError(f"{self.name} has no part {part!r}: one of {', '.join(self.parts)}")
        return self.parts[part]


@dataclass(frozen=True)
class CheckResult:
    """The cases that were right, as text: Jupyter shows it where `check` ends a cell."""

    text: str

    def __repr__(self) -> str:
        return self.text


def run(task: Task, function: Callable, cases: Iterable[Case]) -> CheckResult:
    """Tries the answer in every case.

    Raises:
        NotYet: one line a case, with what is wrong under it.
        NotBegun: from the first case.
    """
    lines: list[str] = []
    right = wrong = 0
    for case in cases:
        try:
            case.judge(function, _generator(case.title))
            right += 1
            lines.append(f"  ✓ {case.title}")
        except NotBegun as complaint:
            raise NotBegun(f"{task.name}: {complaint}") from None
        except NotYet as complaint:
            wrong += 1
            lines.append(f"  ✗ {case.title}")
            for line in str(complaint).splitlines():  # Jupyter would break a long one in the middle of a word
                lines += textwrap.wrap(line, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if wrong:
        raise NotYet("\n".join([f"{task.name}: not yet, {wrong} of {right + wrong} cases wrong", *lines]))
    return CheckResult("\n".join([f"{task.name}: right", *lines]))


_seed: ContextVar[int] = ContextVar("seed", default=0)


@contextmanager
def fresh_inputs(seed: int) -> Iterator[None]:
    """Draws other inputs while the block runs. Grading uses it; a learner always meets the same ones."""
    token = _seed.set(seed)
    try:
        yield
    finally:
        _seed.reset(token)


def _generator(title: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{_seed.get()} {title}".encode()))

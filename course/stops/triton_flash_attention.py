"""Lesson 05's writing stops: a softmax with a row a program, and the loop over tiles of keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted, kind_of_scores, random_rows
from course.tasks.judge import Mistake, call, compare_results
from course.tasks.task import Case, Task
from course.tasks.triton_flash_attention import APART, rows_apart
from course.tasks.triton_slips import OF_RESCALE, OF_SCALE, OF_WHOLE_TILE, inside, window_attention, with_slips

UNIT = "05_triton_flash_attention"


class InTriton:
    """A function of `triton_kernels`, which is imported when it is looked at: other lessons need no Triton."""

    def __init__(self, name: str):
        self.__name__ = name

    @property
    def kernel(self) -> Any:
        """The function as Triton launches it."""
        return getattr(import_module("course.stops.triton_kernels"), self.__name__)

    @property
    def __wrapped__(self) -> Callable:  # what `inspect.getsource` shows
        return self.kernel.fn


def _launched(runner: str) -> Callable:
    """How `call` runs a kernel: by this function of `triton_kernels`."""
    return lambda kernel, *inputs: getattr(import_module("course.stops.triton_kernels"), runner)(kernel, *inputs)


def _softmax_case(rows: int, n: int, block: int = 128, times: float = 1, asks: str = "") -> Case:
    def judge(function: Callable, generator: Generator) -> None:
        x = times * torch.randn(rows, n, generator=generator)
        out = call(function, x, block, through=_launched("run_row_softmax"))
        compare_results(
            out,
            (x, block),
            lambda x, _: x.softmax(-1),
            results={"out": ("row", "column")},
            mistakes=SOFTMAX_MISTAKES,
            asks=asks,
            nan="exp overflows above 88: subtract the row's largest number; or a load without a mask",
            times=times,
        )

    return Case(f"{counted(rows, 'row')} of {counted(n, 'number')}, BLOCK {block}{kind_of_scores(times)}", judge)


def _padded(x: Tensor, block: int) -> Tensor:
    missing = torch.zeros(len(x), block - x.shape[1], dtype=x.dtype)
    return torch.cat([x, missing], 1).softmax(-1)[:, : x.shape[1]]


def _first_row_only(x: Tensor, _: int) -> Tensor:
    return torch.cat([x[:1].softmax(-1), torch.full_like(x[1:], torch.nan)])


FIRST_ROW = "each program takes row 0: its own begins at tl.program_id(0) * stride"
SOFTMAX_MISTAKES = [
    Mistake("what is behind the row counts as 0, and exp(0) is 1: load it as −∞, other=float('-inf')", _padded),
    Mistake(FIRST_ROW, _first_row_only),
    Mistake(FIRST_ROW, lambda x, _: x[:1].softmax(-1).expand_as(x)),
    Mistake("the row does not add up to 1: divide by tl.sum(p, 0)", lambda x, _: (x - x.amax(1, keepdim=True)).exp()),
    Mistake("the exponential is in base 2: tl.exp, or exp2 of x · log2(e)", lambda x, _: (x * math.log(2)).softmax(-1)),
]


def _looped_case(n: int, block: int = 16, d: int = 32, scale: float = 0.3, apart: bool = False, asks: str = "") -> Case:
    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n, n, d, generator)
        q, k = rows_apart(q, k, scale) if apart else (q, k)
        out = call(function, q, k, v, scale, block, through=_launched("run_looped"))
        compare_results(
            out,
            (q, k, v, -1, -1, scale, block),
            window_attention,
            results={"out": ("query", "dim")},
            mistakes=LOOP_MISTAKES,
            asks=asks,
            nan=NAN_LOOPED,
            times=APART / 4 if apart else 1,
        )

    kind = ", every other query's scores are far below" if apart else ""
    return Case(f"{counted(n, 'query', 'queries')} and keys, B {block}, D {d}{kind}", judge)


NAN_LOOPED = (
    "is a row read that is not there? The tile at j begins j * stride numbers after the pointer, and the last one has "
    "n - j rows. Or is m, l or acc used before it has a number, or does m fall, so that exp overflows?"
)


LOOP_MISTAKES = [
    Mistake(
        "the tail is not masked: keys from n on are loaded as 0, and their score must be −∞, not 0",
        with_slips(sees=lambda keys, first, last, j: keys > -1),
    ),
    Mistake(
        "the tail's mask is off by one: keys j + tl.arange(0, B) < n are there",
        with_slips(sees=lambda keys, first, last, j: inside(keys, first, last + 1, j)),
    ),
    Mistake(
        "the tail's mask is off by one: key n - 1 is there too",
        with_slips(sees=lambda keys, first, last, j: inside(keys, first, last - 1, j)),
    ),
    *OF_RESCALE,
    Mistake("m is not carried on: only the last tile counts. Is m = m_new missing?", with_slips(carried=False)),
    *OF_SCALE,
    Mistake("the exponentials are in base 2: tl.exp, or exp2 of scores · log2(e)", with_slips(bases=(2, 2))),
    Mistake("acc is divided by l already: the last line divides, once", with_slips(divided="tile")),
    OF_WHOLE_TILE,
]


STOPS = [
    Task(
        "row_softmax",
        unit=UNIT,
        minutes=5,
        difficulty=1,
        parts={
            "result": [
                _softmax_case(1, 128, asks="one row, no tail"),
                _softmax_case(4, 100, asks="a row a program, with a tail"),
                _softmax_case(3, 17, block=32, times=100, asks="large numbers"),
            ]
        },
        model_answer=cast(Callable, InTriton("row_softmax")),
    ),
    Task(
        "looped",
        unit=UNIT,
        minutes=12,
        difficulty=2,
        parts={
            "result": [
                _looped_case(16, asks="one tile: scores, softmax, values"),
                _looped_case(64, asks="four tiles: is the online softmax right?"),
                _looped_case(43, asks="the third tile has 11 keys"),
                _looped_case(
                    37,
                    block=32,
                    d=16,
                    apart=True,
                    asks="the second tile has 5 keys, and each query has its own largest score",
                ),
            ]
        },
        model_answer=cast(Callable, InTriton("looped")),
    ),
]

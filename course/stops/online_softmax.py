"""Lesson 02: the loop of the online softmax, the same with values, and the merge of two results."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.judge import Mistake, as_tuple, call, compare, compare_results
from course.tasks.mistakes import online_softmax
from course.tasks.task import Case, NotYet, Task

CAUSE = "exp of a score alone overflows, and so does exp(m_new − m): the rescale is exp(m − m_new), at most 1"
NAN: dict[str, Any] = {"nan": CAUSE, "no_key": ""}  # each row sees its keys
HELD = 4  # scores that a loop may hold: the one that it looks at, the largest, and a few by accident


def online_sum(scores: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest score m and l = Σ exp(score − m), in one walk."""
    m, l = torch.tensor(-torch.inf), torch.tensor(0.0)
    for x in scores:
        m_new = torch.maximum(m, x)
        l = l * (m - m_new).exp() + (x - m_new).exp()
        m = m_new
    return m, l


def online_output(scores: Iterable[Tensor], values: Iterable[Tensor]) -> Tensor:
    """softmax(scores) @ values, in one walk."""
    m, l, acc = torch.tensor(-torch.inf), torch.tensor(0.0), torch.tensor(0.0)
    for x, value in zip(scores, values, strict=True):
        m_new = torch.maximum(m, x)
        rescale, p = (m - m_new).exp(), (x - m_new).exp()
        l = l * rescale + p
        acc = acc * rescale + p * value
        m = m_new
    return acc / l


def merge_two(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys, from out (rows, d) and lse (rows,) of each."""
    m = torch.maximum(lse_a, lse_b)
    a, b = (lse_a - m).exp(), (lse_b - m).exp()
    out = (a / (a + b))[:, None] * out_a + (b / (a + b))[:, None] * out_b
    return out, m + (a + b).log()


class Walk:
    """Scores or values that come one after the other, and only once."""

    def __init__(self, row: Tensor):
        self._row, self._begun = row, False
        self._seen: list[weakref.ref[Tensor]] = []

    def __iter__(self) -> Iterator[Tensor]:
        if self._begun:
            raise NotYet("the row is walked along twice: one walk is enough")
        self._begun = True
        for i in range(len(self._row)):
            x = self._row[i].clone()
            self._seen.append(weakref.ref(x))
            if sum(seen() is not None for seen in self._seen) > HELD:
                raise NotYet("what was seen is kept: carry the running numbers alone, and let each score go")
            yield x

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no {name}: the scores come one after the other, `for x in scores`")


def sum_case(title: str, n: int = 6, *, times: float = 1, shift: float = 0, order: Callable | None = None) -> Case:
    """n scores, in this order, times a factor, plus a shift."""

    def judge(function: Callable, generator: Generator) -> None:
        row = torch.randn(n, generator=generator) * times + shift
        row = order(row) if order else row
        compare_results(
            tuple(_one_row(x, row) for x in as_tuple(call(function, Walk(row)))),
            (row,),
            _exact_sum,
            results={"m": ("row",), "l": ("row",)},
            mistakes=SUM_MISTAKES,
            **NAN,
            asks="m is the largest score, l the sum of exp(score − m)",
            times=max(times, abs(shift)),
        )

    return Case(title, judge)


def _one_row(x: Any, row: Tensor) -> Any:
    """A number or a tensor of one number, as a tensor of shape (1,)."""
    if isinstance(x, float | int):
        return row.new_tensor([x])
    return x.reshape(1) if isinstance(x, Tensor) and x.numel() == 1 else x


def _exact_sum(row: Tensor) -> tuple[Tensor, Tensor]:
    return row.amax(0, keepdim=True), (row - row.amax()).exp().sum(0, keepdim=True)


def _sum_with(step: Callable[..., Tensor], start: float = -math.inf) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The loop with another step: the new l from the old one, x, m and m_new."""

    def answer(row: Tensor) -> tuple[Tensor, Tensor]:
        m, l = row.new_tensor(start), row.new_zeros(())
        for x in row:
            m_new = torch.maximum(m, x)
            m, l = m_new, step(l, x, m, m_new)
        return m[None], l[None]

    return answer


SUM_MISTAKES = [
    Mistake(
        "l is not rescaled: when a larger score comes, multiply the old sum by exp(m − m_new)",
        _sum_with(lambda l, x, m, new: l + (x - new).exp()),
    ),
    Mistake(
        "the rescale is upside down: it is exp(m − m_new), at most 1",
        _sum_with(lambda l, x, m, new: (l * (new - m).exp()).nan_to_num() + (x - new).exp()),
    ),
    Mistake(
        "l is thrown away when a larger score comes: rescale it by exp(m − m_new)",
        _sum_with(lambda l, x, m, new: torch.where(new > m, 0, l) + (x - new).exp()),
    ),
    Mistake(
        "a new largest score is lost: after the rescale, add exp(x − m_new), which is 1 for it",
        _sum_with(lambda l, x, m, new: l * (m - new).exp() + torch.where(x > m, 0, (x - new).exp())),
    ),
    Mistake(
        "the new score is rescaled too: rescale the old sum alone, and then add",
        _sum_with(lambda l, x, m, new: (l + (x - new).exp()) * (m - new).exp()),
    ),
    Mistake(
        "the new score is taken under the old m: add exp(x − m_new)",
        _sum_with(lambda l, x, m, new: l * (m - new).exp() + (x - m).exp()),
    ),
    Mistake(
        "m starts at 0: where all scores lie below, it stays there; start at −∞",
        _sum_with(lambda l, x, m, new: l * (m - new).exp() + (x - new).exp(), start=0),
    ),
    Mistake("the powers are of 2: use exp", _sum_with(lambda l, x, m, new: l * 2 ** (m - new) + 2 ** (x - new))),
    Mistake("m stays at −∞: each step ends with m = m_new", lambda row: (row.new_tensor([-math.inf]), row.new_ones(1))),
    Mistake(
        "the first score is counted twice: where m starts with it, begin with the second",
        lambda row: (_exact_sum(row)[0], _exact_sum(row)[1] + (row[:1] - row.amax()).exp()),
    ),
    Mistake(
        "l is the sum of exp(score): subtract m, or exp overflows",
        lambda row: (row.amax()[None], row.exp().sum()[None]),
    ),
    Mistake("m and l are swapped: return m first, then l", lambda row: _exact_sum(row)[::-1]),
    Mistake("l is its logarithm: keep the sum itself", lambda row: (_exact_sum(row)[0], _exact_sum(row)[1].log())),
]


def output_case(title: str, n: int = 6, *, times: float = 1, order: Callable | None = None) -> Case:
    """n scores, in this order, times a factor, with values of 4 numbers."""

    def judge(function: Callable, generator: Generator) -> None:
        row, values = torch.randn(n, generator=generator) * times, torch.randn(n, 4, generator=generator)
        row = order(row) if order else row
        compare_results(
            call(function, Walk(row), Walk(values)),
            (row, values),
            lambda row, values: row.softmax(0) @ values,
            results={"out": ("dim",)},
            mistakes=OUTPUT_MISTAKES,
            **NAN,
            times=times,
        )

    return Case(title, judge)


def _output_with(**slips: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The loop with values, and a slip."""
    return lambda row, values: online_softmax(row[None], values, 1, **slips)[0][0]


OUTPUT_MISTAKES = [
    Mistake("acc is not rescaled: it was summed under the old m, like l", _output_with(rescale_acc=False)),
    Mistake("l is not rescaled: it was summed under the old m, like acc", _output_with(rescale_l=False)),
    Mistake(
        "nothing is rescaled: l and acc were summed under the old m", _output_with(rescale_l=False, rescale_acc=False)
    ),
    Mistake("acc is not divided by l in the end", _output_with(divide=False)),
    Mistake("acc is divided by l in every step: divide once, in the end", _output_with(divide_inside=True)),
    Mistake(
        "acc is divided by l in every step: divide once, in the end", _output_with(divide_inside=True, divide=False)
    ),
    Mistake(
        "it is the plain average of the values: each counts by exp of its score", lambda row, values: values.mean(0)
    ),
    Mistake(
        "the values count by their score: they must count by exp of it", lambda row, values: row / row.sum() @ values
    ),
]


def merge_two_case(title: str, lse_a: float, lse_b: float, *, rows: int = 3, uneven: float = 0) -> Case:
    """Two results of some rows whose lse lie around these numbers, and in each row higher by `uneven`."""

    def judge(function: Callable, generator: Generator) -> None:
        out_a, out_b = torch.randn(2, rows, 4, generator=generator)
        spread_a, spread_b = torch.randn(2, rows, generator=generator) + uneven * torch.arange(rows)
        compare(
            function,
            (out_a, spread_a + lse_a, out_b, spread_b + lse_b),
            merge_two,
            results={"out": ("row", "dim"), "lse": ("row",)},
            mistakes=MERGE_MISTAKES,
            nan="exp of an lse overflows, or all are 0: subtract the larger one of the row first",
            no_key="",
        )

    return Case(title, judge)


def _merge_with(
    share: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    lse: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The merge with other shares or another lse."""

    def answer(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        out, right = merge_two(out_a, lse_a, out_b, lse_b)
        if share:
            a, b = share(lse_a, lse_b)
            out = a[:, None] * out_a + b[:, None] * out_b
        return out, lse(lse_a, lse_b) if lse else right

    return answer


def _one_largest(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """One largest lse for all rows."""
    m = torch.maximum(lse_a, lse_b).max()
    a, b = (lse_a - m).exp(), (lse_b - m).exp()
    return (a / (a + b))[:, None] * out_a + (b / (a + b))[:, None] * out_b, m + (a + b).log()


MERGE_MISTAKES = [
    Mistake("one lse is subtracted in all rows: each row needs the larger one of its own", _one_largest),
    Mistake(
        "it is the plain average: each part counts by exp of its lse",
        _merge_with(lambda a, b: (torch.full_like(a, 0.5), torch.full_like(b, 0.5))),
    ),
    Mistake(
        "the parts are added up: both are normalised already, so weigh them",
        _merge_with(lambda a, b: (torch.ones_like(a), torch.ones_like(b))),
    ),
    Mistake(
        "the shares do not add up to 1: divide both weights by their sum",
        _merge_with(lambda a, b: ((a - a.maximum(b)).exp(), (b - a.maximum(b)).exp())),
    ),
    Mistake(
        "the weights are swapped: the part with the larger lse counts more",
        _merge_with(lambda a, b: ((b - a).sigmoid(), (a - b).sigmoid())),
    ),
    Mistake(
        "the parts count by their lse: they must count by exp of it",
        _merge_with(lambda a, b: (a / (a + b), b / (a + b))),
    ),
    Mistake(
        "the powers are of 2: lse is a natural logarithm, so use exp",
        _merge_with(lambda a, b: (((a - b) * math.log(2)).sigmoid(), ((b - a) * math.log(2)).sigmoid())),
    ),
    Mistake("the new lse is in base 2: it is log(exp a + exp b)", _merge_with(lse=torch.logaddexp2)),
    Mistake("the new lse is the larger of the two: it is log(exp a + exp b)", _merge_with(lse=torch.maximum)),
    Mistake("the new lse is the sum of the two: it is log(exp a + exp b)", _merge_with(lse=torch.add)),
    Mistake(
        "the new lse lacks its shift: add the larger lse again",
        _merge_with(lse=lambda a, b: torch.logaddexp(a, b) - a.maximum(b)),
    ),
    Mistake(
        "right to some 4 digits: near ±1000 the new lse is rounded, and exp(lse_a − lse) shows that. "
        "Take exp(lse_a − the larger one) and divide by the sum of both, as the cell below explains",
        _merge_with(lambda a, b: ((a - torch.logaddexp(a, b)).exp(), (b - torch.logaddexp(a, b)).exp())),
    ),
]

UNIT = "02_online_softmax"
STOPS = [
    Task(
        "online_sum",
        unit=UNIT,
        minutes=5,
        difficulty=1,
        parts={
            "result": [
                sum_case("one score", 1),
                sum_case("falling scores", order=lambda row: row.sort(descending=True).values),
                sum_case("rising scores", order=lambda row: row.sort().values),
                sum_case("scores in any order", 40),
                sum_case("scores near 1000", shift=1000),
                sum_case("scores near −1000", shift=-1000),
            ]
        },
        model_answer=online_sum,
    ),
    Task(
        "online_output",
        unit=UNIT,
        minutes=4,
        difficulty=1,
        parts={
            "result": [
                output_case("one key", 1),
                output_case("falling scores", order=lambda row: row.sort(descending=True).values),
                output_case("rising scores", order=lambda row: row.sort().values),
                output_case("scores in any order, 30 times larger", 40, times=30),
            ]
        },
        model_answer=online_output,
    ),
    Task(
        "merge_two",
        unit=UNIT,
        minutes=6,
        difficulty=2,
        parts={
            "result": [
                merge_two_case("one row", 0, 0, rows=1),
                merge_two_case("three rows, the second part heavier", 0, 2),
                merge_two_case("lse near 1000", 1000, 1001, rows=30),
                merge_two_case("lse near −1000", -1000, -1001, rows=30),
                merge_two_case("lse near 0 and 1000", 0, 1000),
                merge_two_case("lse near −1000 in one row, near 0 and 1000 in the next", -1000, -1000, uneven=1000),
            ]
        },
        model_answer=merge_two,
    ),
]

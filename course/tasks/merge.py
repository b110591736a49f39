"""Unit 02, second task: the merge of any number of partial results."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted
from course.tasks.judge import Mistake, compare
from course.tasks.task import Case, Task

STATE = {"out": ("batch", "query", "head", "dim"), "lse": ("batch", "head", "query")}
EMPTY = -math.inf


def merge_case(
    title: str,
    *lses: float,
    s: int = 5,
    h: int = 3,
    some: bool = False,
    uneven: float = 0,
    asks: str = "",
) -> Case:
    """A part for each lse, its rows' lse around this value.

    Args:
        lses: -inf is a part without keys.
        some: some rows of each part have no keys.
        uneven: so much is added to the lse of the last query, of twice that to the one before, and so on.
        asks: a question to ask where the mistake is not known.
    """

    def judge(function: Callable, generator: Generator) -> None:
        outs, states = zip(*(_state(lse, s, h, generator, some) for lse in lses), strict=True)
        shift = uneven * torch.arange(s).flip(0)
        if some or EMPTY in lses:
            nan = "where all parts are empty, −∞ − (−∞) and 0 / 0 are NaN: the result is 0, its lse −∞"
        else:
            nan = "exp of an lse overflows, or all are 0: subtract the row's largest one first"
        inputs = torch.stack(outs), torch.stack(states) + shift
        compare(function, inputs, _merge, results=STATE, mistakes=MISTAKES, asks=asks, nan=nan, no_key="")

    return Case(f"{title} ({counted(len(lses), 'part')})", judge)


def _state(lse: float, s: int, h: int, generator: Generator, some: bool, d: int = 8) -> tuple[Tensor, Tensor]:
    out, spread = torch.randn(2, s, h, d, generator=generator), torch.randn(2, h, s, generator=generator)
    empty = torch.rand(2, h, s, generator=generator) < (0.5 if some else 0)
    if lse == EMPTY:
        empty[:] = True
    return out.masked_fill(empty.transpose(1, 2)[..., None], 0), (spread + lse).masked_fill(empty, EMPTY)


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    weights = _weights(lses)
    total = weights.sum(0)
    return _weighted(outs, weights / total.masked_fill(total == 0, 1)), lses.logsumexp(0)


def _weights(lses: Tensor, largest: Tensor | None = None) -> Tensor:
    """exp(lse − the largest of all parts), or what stands in its place."""
    largest = lses.amax(0) if largest is None else largest
    return (lses - largest.masked_fill(largest == EMPTY, 0)).exp()


def _weighted(outs: Tensor, shares: Tensor) -> Tensor:
    """outs (parts, batch, query, head, dim) summed with shares (parts, batch, head, query)."""
    return (shares.transpose(2, 3)[..., None] * outs).sum(0)


def _with(shares: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrong shares, with the right lse."""
    return lambda outs, lses: (_weighted(outs, shares(lses)), lses.logsumexp(0))


def _with_lse(change: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right output, with a wrong lse."""
    return lambda outs, lses: (_merge(outs, lses)[0], change(lses))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(0)


def _over(axis: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Shares that add up to 1 over another axis than the parts."""
    return _with(lambda lses: lses.softmax(axis).nan_to_num())


def _crossed(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of (head, query) used as (query, head): only possible where there are as many of each."""
    out, lse = _merge(outs, lses)
    if lse.shape[1] != lse.shape[2]:
        return out, lse
    return _merge(outs, lses.transpose(2, 3))[0], lse


def _one_largest(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """One largest lse for all rows."""
    largest = lses.amax()
    weights = _weights(lses, largest)
    total = weights.sum(0).masked_fill(lses.amax(0) == EMPTY, 1)  # empty parts alone are another mistake
    return _weighted(outs, weights / total), largest + weights.sum(0).log()


def _first(parts: Callable[[int], int]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The first parts alone; how many, is a function of how many there are."""
    return lambda outs, lses: _merge(outs[: parts(len(outs))], lses[: parts(len(outs))])


def _log(lses: Tensor, exp: Callable = torch.exp, log: Callable = torch.log) -> Tensor:
    largest = lses.amax(0)
    return largest + log(exp(lses - largest).sum(0))


MISTAKES = [
    Mistake(
        "it is the plain average: each part counts by exp of its lse",
        _with(lambda lses: torch.full_like(lses, 1 / len(lses))),
    ),
    Mistake("the shares do not add up to 1: divide the weights by their sum", _with(_weights)),
    Mistake("the parts are added up: they are normalised already, so weigh them", _with(torch.ones_like)),
    Mistake(
        "the weights are upside down: the part with the larger lse counts more",
        _with(lambda lses: _normalised(_weights(-lses))),
    ),
    Mistake(
        "the parts count by their lse: they must count by exp of it",
        _with(_normalised),
    ),
    Mistake(
        "the weights are in base 2: lse is a natural logarithm, so use exp",
        _with(lambda lses: _normalised(_weights(lses * math.log(2)))),
    ),
    Mistake("lse is (batch, head, query) and out (batch, query, head, dim): transpose the weights", _crossed),
    Mistake("the shares of the heads add up to 1: they must do so over the parts, which are axis 0", _over(2)),
    Mistake("the shares of the queries add up to 1: they must do so over the parts, which are axis 0", _over(3)),
    Mistake(
        "only the part with the largest lse is there: the others count too, by exp of their lse",
        _with(lambda lses: (lses == lses.amax(0)).to(lses.dtype)),
    ),
    Mistake("only the first part is there: merge all of them", _first(lambda n: 1)),
    Mistake("only the first two parts are merged: there may be more", _first(lambda n: 2)),
    Mistake("the last part is lost: merge all of them", _first(lambda n: max(1, n - 1))),
    Mistake("one largest lse is subtracted in all rows: each row needs its own, or its weights are 0", _one_largest),
    Mistake(
        "the new lse is in base 2: it is log of the sum of exp", _with_lse(lambda x: _log(x, torch.exp2, torch.log2))
    ),
    Mistake("log2 of the sum is no natural logarithm", _with_lse(lambda x: _log(x, log=torch.log2))),
    Mistake("the new lse is the largest one: it is log of the sum of exp", _with_lse(lambda x: x.amax(0))),
    Mistake("the new lse is the sum of all: it is log of the sum of exp", _with_lse(lambda x: x.sum(0))),
    Mistake("the new lse is the average: it is log of the sum of exp", _with_lse(lambda x: x.mean(0))),
    Mistake("the new lse lacks its shift: add the largest lse again", _with_lse(lambda x: _log(x) - x.amax(0))),
    Mistake(
        "right to some 4 digits: near ±1000 an lse that you compute is rounded, and exp of a difference with it shows "
        "that. Take exp(lse − the largest) of all parts at once, and divide by their sum",
        _with(lambda lses: (lses - lses.logsumexp(0)).exp().nan_to_num()),
    ),
]

EMPTY_ASKS = "an empty part counts nothing, and if all are empty, the result is 0 and lse −∞"

MERGE = Task(
    "merge",
    unit="02_online_softmax",
    minutes=30,
    difficulty=2,
    parts={
        "result": [
            merge_case("two parts", 0, 0),
            merge_case("many parts", 0, 2, -1, 1, 0),
            merge_case("as many heads as queries", 0, 1, 0, s=4, h=4),
            merge_case("nothing to merge", 0),
        ],
        "empty": [
            merge_case("the first is empty", EMPTY, 0, 0, asks=EMPTY_ASKS),
            merge_case("the last is empty", 0, 1, EMPTY, asks=EMPTY_ASKS),
            merge_case("all are empty", EMPTY, EMPTY, EMPTY, asks=EMPTY_ASKS),
            merge_case("some rows are empty", 0, 0, some=True, asks=EMPTY_ASKS),
        ],
        "magnitude": [
            merge_case("lse near 1000", 1000, 1000, 1001),
            merge_case("lse near −1000", -1000, -1001, -1000),
            merge_case("lse near 0 and 1000", 0, 1000, 0),
            merge_case("lse near 0 in one query, 800 more in each before", 0, 0, uneven=800),
        ],
    },
)

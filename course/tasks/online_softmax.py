"""Unit 02: attention in one pass over the keys, and the merge of two partial results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.cases import COARSE, ELSEWHERE, LOW, START, counted, far_below, kind_of_scores, random_rows
from course.tasks.hbm import Rows, call_in_tiles
from course.tasks.judge import Mistake, compare, compare_results
from course.tasks.mistakes import (
    masked_scores,
    of_base,
    of_division,
    of_padding,
    of_rescale,
    of_scale,
    online_softmax,
)
from course.tasks.task import Case, NotYet, Task
from minillm.attention import merge_state
from minillm.measure.traffic import Traffic

OUT_LSE = {"out": ("row", "dim"), "lse": ("row",)}
STATE = {"out": ("batch", "query", "head", "dim"), "lse": ("batch", "head", "query")}


def one_pass_case(
    rows: int,
    n: int,
    block: int,
    *,
    times: float = 1,
    rising: bool = False,
    low: bool = False,
    asks: str = "",
) -> Case:
    """Queries, keys, keys at a time; q is multiplied by `times`; with `rising`, each score is larger than the last;
    with `low`, see `far_below`."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(rows, n, 16, generator, rising)
        q, k = far_below(q, k, generator) if low else (q * times, k)
        got, _ = _one_pass(function, q, k, v, block)
        compare_results(
            got,
            (q, k, v, block),
            _exact,
            results=OUT_LSE,
            mistakes=ONE_PASS_MISTAKES,
            asks=asks,
            nan=START if low else "exp overflows: subtract the largest score so far, and rescale by exp(m − m_new)",
            times=LOW if low else times,
        )

    kind = kind_of_scores(times, rising, low)
    return Case(f"{counted(rows, 'row')}, {counted(n, 'key')}, {block} at a time{kind}", judge)


def memory_case(rows: int = 64, n: int = 1 << 18, block: int = 2048) -> Case:
    """One pass, at lengths at which all scores, and copies of all keys and values, need far more than one block."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(rows, n, 16, generator)
        too_much = "the scores, or copies, of all keys are in memory: keep those of one block, and m, l and acc"
        result, traffic = _one_pass(function, q, k, v, block, memory=16 << 20, too_much=too_much)
        some = slice(0, rows, rows // 4)  # enough to see that it is the right one, at a fraction of the time
        if isinstance(result, (tuple, list)) and all(isinstance(x, Tensor) and len(x) == rows for x in result):
            result = tuple(x[some] for x in result)
        compare_results(result, (q[some], k, v, block), _exact, results=OUT_LSE, asks=ELSEWHERE, times=COARSE)
        passes = traffic.total / (k.nbytes + v.nbytes)
        if passes > 1.1:
            raise NotYet(f"right, but it reads k and v {passes:.1f} times: look at no key twice, for any of the rows")

    return Case(f"{rows} rows, {n} keys, {block} at a time: one pass, memory", judge)


def _one_pass(function: Callable, q: Tensor, k: Tensor, v: Tensor, block: int, **memory: Any) -> tuple[Any, Traffic]:
    """The answer's result, with k and v in counted HBM, and what it moved; `memory` is for `call_in_tiles`."""
    traffic = Traffic(sram=4 * block * k.shape[1] * k.itemsize)  # two blocks each: the old ones while the new come
    hbm = [Rows(x, name, traffic) for name, x in (("k", k), ("v", v))]
    cure = f"load {block} rows of k and v at a time, and let go of those that you have used"
    return call_in_tiles(function, q, *hbm, block, cure=cure, **memory), traffic


def _exact(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    scores = q @ k.T / q.shape[1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _loop(
    q: Tensor, k: Tensor, v: Tensor, block: int, *, scale: float | None = None, **slips: Any
) -> tuple[Tensor, Tensor]:
    """One pass, with the slips of `online_softmax`."""
    return online_softmax(masked_scores(q, k, causal=False, scale=scale), v, block, **slips)


def _without_tail(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    whole = len(k) // block * block
    return _loop(q, k[:whole], v[:whole], block)


def _average(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    parts = zip(k.split(block), v.split(block), strict=True)
    return torch.stack([_exact(q, *part, block)[0] for part in parts]).mean(0), _exact(q, k, v, block)[1]


def _with_lse(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right output, with a wrong lse made of the largest score and the right lse."""

    def answer(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
        out, lse = _exact(q, k, v, block)
        return out, change((q @ k.T / q.shape[1] ** 0.5).amax(-1), lse)

    return answer


ONE_PASS_MISTAKES = [
    *of_rescale(_loop),
    Mistake("the last keys are missing: is there a tail that does not fill a block?", _without_tail),
    of_padding(_loop),
    of_base(_loop),
    *of_scale(_loop),
    Mistake("it is the plain average of the blocks: a block counts by exp of its lse", _average),
    of_division(_loop),
    Mistake("lse is in base 2: the natural logarithm is wanted", _with_lse(lambda m, lse: lse / math.log(2))),
    Mistake(
        "log2 of l is no natural logarithm: lse is m + log l", _with_lse(lambda m, lse: m + (lse - m) / math.log(2))
    ),
    Mistake("lse lacks the largest score: it is m + log l", _with_lse(lambda m, lse: lse - m)),
    Mistake("lse is the largest score alone: it is m + log l", _with_lse(lambda m, lse: m)),
    Mistake("lse is l, and not its logarithm with m added", _with_lse(lambda m, lse: (lse - m).exp())),
]


def merge_case(
    title: str, lse_a: float, lse_b: float, *, s: int = 5, h: int = 3, some: bool = False, asks: str = ""
) -> Case:
    """Two states whose lse lie around these values; -inf is a part without keys. With `some`, some rows have none."""

    def judge(function: Callable, generator: Generator) -> None:
        inputs = (*_state(lse_a, s, h, generator, some), *_state(lse_b, s, h, generator, some))
        if some or lse_a == lse_b == -math.inf:
            nan = "where both parts are empty, −∞ − (−∞) is NaN. The result is 0, its lse −∞"
        elif -math.inf in (lse_a, lse_b):
            nan = "one part is empty: its weight is exp(−∞) = 0"
        else:
            nan = "exp of an lse overflows: subtract the larger one first"
        compare(function, inputs, merge_state, results=STATE, mistakes=MERGE_MISTAKES, asks=asks, nan=nan)

    return Case(title, judge)


def _state(lse: float, s: int, h: int, generator: Generator, some: bool, d: int = 8) -> tuple[Tensor, Tensor]:
    out, spread = torch.randn(2, s, h, d, generator=generator), torch.randn(2, h, s, generator=generator)
    empty = torch.rand(2, h, s, generator=generator) < (0.5 if some else 0)
    if lse == -math.inf:
        empty[:] = True
    return out.masked_fill(empty.transpose(1, 2)[..., None], 0), (spread + lse).masked_fill(empty, -math.inf)


def _weighted(state: tuple[Tensor, ...], weight_a: Tensor, weight_b: Tensor) -> tuple[Tensor, Tensor]:
    """Any weights, (batch, head, query), with the right lse."""
    out_a, _, out_b, _ = state
    rows_a, rows_b = (weight.transpose(1, 2)[..., None] for weight in (weight_a, weight_b))
    return (rows_a * out_a + rows_b * out_b).nan_to_num(), merge_state(*state)[1]


def _crossed(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of (head, query) used as (query, head): only possible where there are as many of each."""
    if lse_a.shape[1] != lse_a.shape[2]:
        return merge_state(out_a, lse_a, out_b, lse_b)
    out, _ = merge_state(out_a, lse_a.transpose(1, 2), out_b, lse_b.transpose(1, 2))
    return out, merge_state(out_a, lse_a, out_b, lse_b)[1]


def _merged(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right output, with a wrong lse made of the two and the right one."""

    def answer(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge_state(out_a, lse_a, out_b, lse_b)
        return out, change(lse_a, lse_b, lse)

    return answer


MERGE_MISTAKES = [
    Mistake(
        "it is the plain average: each part counts by exp of its lse",
        lambda *x: _weighted(x, torch.full_like(x[1], 0.5), torch.full_like(x[1], 0.5)),
    ),
    Mistake(
        "the weights do not add up to 1: divide by their sum",
        lambda *x: _weighted(x, (x[1] - torch.maximum(x[1], x[3])).exp(), (x[3] - torch.maximum(x[1], x[3])).exp()),
    ),
    Mistake(
        "the parts are added up: both are normalised already, so weigh them",
        lambda *x: _weighted(x, torch.ones_like(x[1]), torch.ones_like(x[1])),
    ),
    Mistake(
        "the weights are swapped: the part with the larger lse counts more",
        lambda *x: _weighted(x, (x[3] - x[1]).sigmoid(), (x[1] - x[3]).sigmoid()),
    ),
    Mistake(
        "the parts count by their lse: they must count by exp of it",
        lambda *x: _weighted(x, x[1] / (x[1] + x[3]), x[3] / (x[1] + x[3])),
    ),
    Mistake(
        "the weights are in base 2: lse is a natural logarithm, so use exp",
        lambda *x: _weighted(x, ((x[1] - x[3]) * math.log(2)).sigmoid(), ((x[3] - x[1]) * math.log(2)).sigmoid()),
    ),
    Mistake(
        "lse is (batch, head, query) and out (batch, query, head, dim): transpose the weights",
        _crossed,
    ),
    Mistake(
        "the part with the smaller lse is lost: it counts too, by exp of its lse",
        lambda *x: _weighted(x, (x[1] >= x[3]).to(x[0].dtype), (x[1] < x[3]).to(x[0].dtype)),
    ),
    Mistake(
        "the new lse is in base 2: it is log(exp a + exp b)",
        _merged(lambda a, b, _: torch.logaddexp2(a, b)),
    ),
    Mistake("the new lse is the larger of the two: it is log(exp a + exp b)", _merged(lambda a, b, _: a.maximum(b))),
    Mistake("the new lse is the sum of the two: it is log(exp a + exp b)", _merged(lambda a, b, _: a + b)),
    Mistake("the new lse lacks its shift: add the larger lse again", _merged(lambda a, b, lse: lse - a.maximum(b))),
]

TASKS = [
    Task(
        "one_pass_attention",
        unit="02_online_softmax",
        minutes=40,
        difficulty=2,
        parts={
            "result": [
                one_pass_case(5, 12, 12, asks="one block only: is it softmax(q kᵀ/√d) v?"),
                one_pass_case(5, 12, 4, asks="three blocks: what happens when the largest score rises?"),
            ],
            "tail": [
                one_pass_case(5, 10, 4, asks="the last block has 2 keys"),
                one_pass_case(3, 7, 16, asks="the only block has 7 keys"),
            ],
            "numbers": [
                one_pass_case(4, 300, 16, rising=True, asks="each block has a new largest score"),
                one_pass_case(6, 50, 8, times=30, asks="does it hold for large scores too?"),
                one_pass_case(4, 20, 8, low=True, asks="the largest score of a row may lie far below 0"),
            ],
            "memory": [memory_case()],
        },
    ),
    Task(
        "merge",
        unit="02_online_softmax",
        minutes=25,
        difficulty=2,
        parts={
            "result": [
                merge_case("two parts", 0, 0),
                merge_case("as many heads as queries", 0, 1, s=4, h=4),
            ],
            "empty": [
                merge_case("the left part is empty", -math.inf, 0),
                merge_case("the right part is empty", 0, -math.inf),
                merge_case("both parts are empty", -math.inf, -math.inf),
                merge_case("some rows are empty", 0, 0, some=True),
            ],
            "magnitude": [
                merge_case("lse near 1000", 1000, 1000),
                merge_case("lse near −1000", -1000, -1000),
                merge_case("lse near 0 and 1000", 0, 1000),
            ],
        },
    ),
]

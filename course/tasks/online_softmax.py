"""Unit 02: attention in one pass over the keys, and the merge of two partial results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.cases import COARSE, ELSEWHERE, counted, far_below, kind_of_scores, random_rows
from course.tasks.hbm import Rows, call_in_tiles
from course.tasks.judge import Mistake, compare_results
from course.tasks.merge import MERGE
from course.tasks.mistakes import (
    masked_scores,
    of_base,
    of_base_2_throughout,
    of_division,
    of_division_inside,
    of_padding,
    of_rescale,
    of_scale,
    of_shared_maximum,
    online_softmax,
)
from course.tasks.task import Case, NotYet, Task
from minillm.measure.traffic import Traffic

OUT_LSE = {"out": ("row", "dim"), "lse": ("row",)}


def one_pass_case(
    rows: int,
    n: int,
    block: int,
    *,
    times: float = 1,
    rising: bool = False,
    low: int = 0,
    uneven: bool = False,
    asks: str = "",
) -> Case:
    """Queries, keys, keys at a time.

    Args:
        times: q is multiplied by it.
        rising: each score of a row is larger than the last.
        low: all scores lie about so far below 0.
        uneven: the last row's scores are 1000 times as large as the others'.
        asks: a question to ask where the mistake is not known.
    """

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(rows, n, 16, generator, rising)
        if low:
            q, k = far_below(q, k, generator, low)
        q = q * times
        q[-1] *= 1000 if uneven else 1
        got, _ = _one_pass(function, q, k, v, block)
        nan = "exp overflows: subtract the largest score so far, and rescale by exp(m − m_new)"
        if low:
            nan = f"all scores are near −{low}, and their exp is 0: m starts at −∞, not at 0, nor at another number"
        if uneven:
            nan = "is the largest score subtracted, and in each row its own?"
        if block > n:
            nan = "0 / 0, if the only block is left out because it is not full; or exp overflows"
        compare_results(
            got,
            (q, k, v, block),
            _exact,
            results=OUT_LSE,
            mistakes=ONE_PASS_MISTAKES,
            asks=asks,
            nan=nan,
            no_key="",
            times=max(times, min(low, 1000), 1000 * uneven),
        )

    kind = f", scores near −{low}" * bool(low) + ", scores of one row × 1000" * uneven
    kind = kind or kind_of_scores(times, rising)
    return Case(f"{counted(rows, 'row')}, {counted(n, 'key')}, {block} at a time{kind}", judge)


def memory_case(rows: int = 64, n: int = 1 << 18, block: int = 2048) -> Case:
    """One pass, at lengths at which all scores, and copies of all keys and values, need far more than one block."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(rows, n, 16, generator)
        too_much = "the scores, or copies, of all keys are in memory: keep those of one block, and m, l and acc"
        result, traffic = _one_pass(function, q, k, v, block, memory=16 << 20, too_much=too_much)
        compare_results(result, (q, k, v, block), _exact_in_pieces, results=OUT_LSE, asks=ELSEWHERE, times=COARSE)
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


def _exact_in_pieces(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, ...]:
    """A few rows at a time, since all scores in float64 would need 100 MiB and more."""
    return tuple(map(torch.cat, zip(*(_exact(rows, k, v, block) for rows in q.split(8)), strict=True)))


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
    of_base_2_throughout(_loop),
    of_shared_maximum(_loop),
    *of_scale(_loop),
    Mistake("it is the plain average of the blocks: a block counts by exp of its lse", _average),
    of_division(_loop),
    *of_division_inside(_loop),
    Mistake("lse is in base 2: the natural logarithm is wanted", _with_lse(lambda m, lse: lse / math.log(2))),
    Mistake(
        "log2 of l is no natural logarithm: lse is m + log l", _with_lse(lambda m, lse: m + (lse - m) / math.log(2))
    ),
    Mistake("lse lacks the largest score: it is m + log l", _with_lse(lambda m, lse: lse - m)),
    Mistake("lse is the largest score alone: it is m + log l", _with_lse(lambda m, lse: m)),
    Mistake("lse is l, and not its logarithm with m added", _with_lse(lambda m, lse: (lse - m).exp())),
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
                one_pass_case(4, 20, 8, low=400, asks="the largest score of a row may lie far below 0"),
                one_pass_case(4, 20, 8, low=20_000, asks="the largest score of a row may lie far below 0"),
                one_pass_case(6, 30, 8, uneven=True, asks="is each row's m its own?"),
            ],
            "memory": [memory_case()],
        },
    ),
    MERGE,
]

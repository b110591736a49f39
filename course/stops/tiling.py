"""Lesson 03's writing stops: the walk of one tile of queries over its keys, and dS of one tile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.cases import LOW, counted, far_below, kind_of_scores, lengths, random_rows
from course.tasks.hbm import Rows, call_in_tiles
from course.tasks.judge import Mistake, compare, compare_results
from course.tasks.mistakes import masked_scores, of_delta, of_division, of_rescale, of_scale, online_softmax
from course.tasks.task import Case, NotYet, Task
from course.tasks.tiling_slips import walk, walk_mistakes
from minillm.attention.online import OnlineSoftmax
from minillm.measure.traffic import Counted, Traffic

__all__ = ["STOPS", "grad_scores", "one_tile"]


def one_tile(q_tile: Tensor, k: Counted, v: Counted, block_k: int) -> Tensor:
    """The output of a tile of queries: k and v come in from HBM, block_k rows at a time."""
    n_keys, d = k.shape
    state = OnlineSoftmax((len(q_tile),), d, q_tile.dtype)  # m, l, acc of these rows
    for j in range(0, n_keys, block_k):
        k_tile, v_tile = k.load(slice(j, j + block_k)), v.load(slice(j, j + block_k))
        state.update(q_tile @ k_tile.T / d**0.5, v_tile)
    return state.finish()[0]


def grad_scores(P: Tensor, v: Tensor, out: Tensor, grad_out: Tensor) -> Tensor:
    """dS of one tile: P (queries, keys) and v (keys, d) are the tile's, out and dO (queries, d) whole rows."""
    delta = (grad_out * out).sum(-1, keepdim=True)  # a number a query, over all keys
    return P * (grad_out @ v.T - delta)


def walk_case(n_q: int, n_k: int, block_k: int, *, rising: bool = False, low: bool = False, asks: str = "") -> Case:
    """One tile of queries and all keys, without a mask; k and v lie in HBM, and the chip holds two tiles of each."""
    d = 8

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n_q, n_k, d, generator, rising)
        q, k = far_below(q, k, generator) if low else (q, k)
        traffic = Traffic(4 * 4 * block_k * d)
        cure = f"load {block_k} rows of k and v at a time"
        got = call_in_tiles(
            _library_allowed(function), q, Rows(k, "k", traffic), Rows(v, "v", traffic), block_k, cure=cure
        )
        compare_results(
            got,
            (q, k, v, block_k),
            _exact,
            results={"out": ("query", "dim")},
            mistakes=WALK_MISTAKES,
            asks=asks,
            nan="is m the largest score so far of each row, and does it start at −∞?",
            times=LOW if low else 1,
        )
        for name in ("k", "v"):
            if traffic.read[name] > n_k * d * 4:
                raise NotYet(f"right, but {name} was loaded more than once: load each tile once")

    title = f"{lengths(n_q, n_k)}, tiles of {block_k}{kind_of_scores(1, rising, low)}"
    return Case(title, judge)


def _library_allowed(function: Callable) -> Callable:
    """The answer, which may use the course's OnlineSoftmax here: `call` refuses what the library computes."""

    def allowed(*inputs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*inputs)

    allowed.fn = function  # type: ignore[attr-defined]  # `call` looks there for the learner's own lines
    return allowed


def _exact(q: Tensor, k: Tensor, v: Tensor, _: int) -> Tensor:
    return masked_scores(q, k, causal=False).softmax(-1) @ v


def _online(q: Tensor, k: Tensor, v: Tensor, block_k: int, *, scale: float | None = None, **slips: Any) -> Tensor:
    return online_softmax(masked_scores(q, k, causal=False, scale=scale), v, block_k, **slips)[0]


def _walk(q: Tensor, k: Tensor, v: Tensor, block_k: int, **slips: Any) -> Tensor:
    return walk(q, k, v, len(q), block_k, causal=False, **slips)


def _whole_tiles(q: Tensor, k: Tensor, v: Tensor, block_k: int) -> Tensor:
    whole = len(k) // block_k * block_k
    return _exact(q, k[:whole], v[:whole], block_k)


WALK_MISTAKES = [
    *of_scale(_online),
    *of_rescale(_online),
    of_division(_online),
    *walk_mistakes(_walk),
    Mistake("the last keys are missing: is there a tail that does not fill a tile?", _whole_tiles),
    Mistake(
        "the first tile of keys counts alone: is the return inside the loop?",
        lambda q, k, v, block_k: _exact(q, k[:block_k], v[:block_k], block_k),
    ),
    Mistake("there is a causal mask: here, each query sees all keys", lambda q, k, v, _: _causal(q, k, v)),
]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.arange(len(k)) > torch.arange(len(q))[:, None]
    return masked_scores(q, k, causal=False).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def grad_case(n_q: int, keys: range, n_k: int, *, asks: str = "") -> Case:
    """dS of n_q queries and some of their n_k keys."""
    d = 8

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n_q, n_k, d, generator)
        P = masked_scores(q, k, causal=False).softmax(-1)
        some = slice(keys.start, keys.stop)
        inputs = (P[:, some].clone(), v[some].clone(), P @ v, torch.randn(n_q, d, generator=generator))
        results = {"dS": ("query", "key of the tile")}
        compare(function, inputs, grad_scores, results=results, mistakes=GRAD_MISTAKES, asks=asks, factor=3)

    of_all = "all" if len(keys) == n_k else f"keys {keys.start} to {keys.stop - 1} of"
    return Case(f"{counted(n_q, 'query', 'queries')}, {of_all} {counted(n_k, 'key')}", judge)


def _slipped(
    P: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    *,
    sums: Callable[[Tensor, Tensor], Tensor] = lambda products, _: products.sum(-1, keepdim=True),
    delta: int = 1,
    scale: float = 1,
    through_softmax: bool = True,
) -> Tensor:
    """dS; δ sums dO ∘ O, or P ∘ dP, and counts `delta` times; the options are slips."""
    grad_p = grad_out @ v.T
    difference = grad_p - delta * sums(grad_out * out, P * grad_p)
    return scale * (P * difference if through_softmax else difference)


def _untransposed(P: Tensor, v: Tensor, out: Tensor, grad_out: Tensor) -> Tensor:
    return grad_scores(P, v.T if v.shape[0] == v.shape[1] else v, out, grad_out)


GRAD_MISTAKES = [
    *of_delta(_slipped),
    Mistake(
        "δ is the sum of P ∘ dP over this tile's keys: it goes over all keys, and Σ dO · O is that sum",
        partial(_slipped, sums=lambda _, of_tile: of_tile.sum(-1, keepdim=True)),
    ),
    Mistake(
        "δ is one number for all queries: each row has its own, the sum of its dO · O",
        partial(_slipped, sums=lambda products, _: products.sum()),
    ),
    Mistake(
        "δ is the mean of dO · O over a row: it is the sum",
        partial(_slipped, sums=lambda products, _: products.mean(-1, keepdim=True)),
    ),
    Mistake("P is missing: dS = P ∘ (dP − δ)", partial(_slipped, through_softmax=False)),
    Mistake(
        "P is a factor of dP alone: dS = P ∘ (dP − δ), so it multiplies δ too",
        lambda P, v, out, grad_out: P * (grad_out @ v.T) - (grad_out * out).sum(-1, keepdim=True),
    ),
    Mistake("the scale 1/√d is in it: it comes later, with dQ and dK", partial(_slipped, scale=8**-0.5)),
    Mistake("v is not transposed: dP = dO Vᵀ", _untransposed),
]


STOPS = [
    Task(
        "one_tile",
        unit="03_tiling",
        minutes=6,
        difficulty=2,
        parts={
            "result": [
                walk_case(3, 4, 4, asks="one tile of keys: is it softmax(Q Kᵀ / √d) V?"),
                walk_case(5, 12, 4, asks="three tiles of keys"),
                walk_case(4, 10, 4, asks="the last tile has 2 keys"),
                walk_case(6, 40, 8, rising=True, asks="each tile has a new largest score"),
                walk_case(4, 12, 4, low=True, asks="the largest score of a row may lie far below 0"),
            ]
        },
        model_answer=one_tile,
    ),
    Task(
        "grad_scores",
        unit="03_tiling",
        minutes=4,
        difficulty=2,
        parts={
            "result": [
                grad_case(4, range(6), 6, asks="dP = dO Vᵀ, δ = Σ dO · O, dS = P ∘ (dP − δ)"),
                grad_case(5, range(8, 16), 16, asks="a tile of the keys: δ is of the whole row"),
                grad_case(7, range(9, 12), 12, asks="the last tile has 3 keys"),
            ]
        },
        model_answer=grad_scores,
    ),
]

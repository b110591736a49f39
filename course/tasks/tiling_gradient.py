"""Unit 03, the other task: the gradient of q by recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.cases import COARSE, ELSEWHERE, kind_of_scores, random_rows
from course.tasks.judge import Mistake, compare, compare_results, extra_memory_below
from course.tasks.mistakes import Sees, in_a_visible_tile, masked_scores, of_causal_mask, of_delta, of_skipped_tiles
from course.tasks.task import Case, Task
from minillm.attention import flash_attention

GRAD = {"grad_q": ("query", "dim")}
NAN_GRAD = "exp overflows where a hidden key is not masked before it, or where lse is not subtracted"


def grad_case(n: int, block_q: int, block_k: int, *, times: float = 1, d: int = 8, asks: str = "") -> Case:
    """The gradient of q for random gradients of out; q is multiplied by `times`."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v, out, lse, grad_out = _saved(n, d, times, generator)
        inputs = (q, k, v, out, lse, grad_out, block_q, block_k)
        compare(
            function,
            inputs,
            _exact_grad,
            results=GRAD,
            mistakes=GRAD_MISTAKES,
            asks=asks,
            nan=NAN_GRAD,
            times=times,
            factor=3,
        )

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}{kind_of_scores(times)}", judge)


def grad_memory_case(n: int = 4096, block_q: int = 128, block_k: int = 512, d: int = 16) -> Case:
    """A length at which all probabilities need far more memory than those of a row of tiles."""

    def judge(function: Callable, generator: Generator) -> None:
        saved = _saved(n, d, 1, generator)
        too_much = "probabilities of the whole sequence are in memory: compute each tile again when it is needed"
        result = extra_memory_below(24 << 20, function, *saved, block_q, block_k, too_much=too_much)
        some = slice(-8, None)  # the last rows see all keys
        q, k, v, out, lse, grad_out = saved
        rows = (q[some], k, v, out[some], lse[some], grad_out[some], block_q, block_k)
        result = result[some] if isinstance(result, Tensor) and len(result) == n else result
        compare_results(result, rows, _exact_grad, results=GRAD, asks=ELSEWHERE, factor=3, times=COARSE)

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}: memory", judge)


def _saved(n: int, d: int, times: float, generator: Generator) -> tuple[Tensor, ...]:
    """q, k, v, and what the forward leaves: out and lse; and a gradient of out."""
    q, k, v = random_rows(n, n, d, generator)
    q = q * times
    out, lse = flash_attention(
        *(x[None, :, None] for x in (q, k, v)), causal=True, return_lse=True, block_q=512, block_k=512
    )
    return q, k, v, out[0, :, 0], lse[0, 0], torch.randn(n, d, generator=generator)


def _exact_grad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    block_q: int,
    block_k: int,
    *,
    delta: float = 1,
    scale: float | None = None,
    shift: int = 0,
    sees: Sees = torch.ge,
    weights: Callable[[Tensor, Tensor], Tensor] = lambda scores, lse: (scores - lse).exp(),
    through_softmax: bool = True,
    counts: slice = slice(None),
) -> Tensor:
    """dS K · scale, all at once; the options are slips that people make."""
    right = q.shape[1] ** -0.5
    scores = masked_scores(q, k, shift=shift, sees=sees)
    grad_p = grad_out @ v.T - delta * (grad_out * out).sum(-1, keepdim=True)
    grad_scores = (weights(scores, lse[:, None]) if through_softmax else scores > -torch.inf) * grad_p
    return grad_scores[:, counts] @ k[counts] * (right if scale is None else scale)


def _tile_by_tile(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    """Each tile of keys with a softmax of its own."""
    block_k = rest[-1]
    weights = lambda scores, _: torch.cat([x.softmax(-1).nan_to_num(0) for x in scores.split(block_k, dim=1)], dim=1)  # noqa: E731
    return _exact_grad(q, k, v, out, lse, *rest, weights=weights)


def _last_tile(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    """For each query, only the last tile of keys that its tile of queries sees."""
    block_q, block_k = rest[-2:]
    result = torch.zeros_like(q)
    for i in range(0, len(q), block_q):
        last = (min(i + block_q, len(k)) - 1) // block_k * block_k
        result[i : i + block_q] = _exact_grad(q, k, *rest, counts=slice(last, last + block_k))[i : i + block_q]
    return result


def _grad_k(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *_: int) -> Tensor:
    """dSᵀ Q · scale."""
    grad_p = grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)
    scores = q @ k.T * q.shape[1] ** -0.5
    return ((scores - lse[:, None]).exp().tril() * grad_p).T @ q * q.shape[1] ** -0.5


GRAD_MISTAKES = [
    *of_delta(_exact_grad),
    Mistake(
        "the scale is forgotten: the scores were multiplied by 1/√d, so dQ is too",
        lambda *x: _exact_grad(*x, scale=1.0),
    ),
    Mistake("the scale is there twice: dQ = dS K / √d", lambda *x: _exact_grad(*x, scale=1 / x[0].shape[1])),
    *of_causal_mask(_exact_grad),
    of_skipped_tiles(_exact_grad),
    Mistake(
        "the probabilities are not normalised: P = exp(S − lse), lse being saved for that",
        lambda *x: _exact_grad(*x, weights=lambda scores, _: scores.exp()),
    ),
    Mistake(
        "the probabilities are not normalised: P = exp(S − lse), with lse and not the row's largest score",
        lambda *x: _exact_grad(*x, weights=lambda scores, _: (scores - scores.amax(-1, keepdim=True)).exp()),
    ),
    Mistake(
        "it is a softmax over each tile of keys: P = exp(S − lse), with the lse of the whole row",
        _tile_by_tile,
    ),
    Mistake(
        "the exponentials are in base 2: lse is a natural logarithm",
        lambda *x: _exact_grad(*x, weights=lambda scores, lse: (scores - lse).exp2()),
    ),
    Mistake("P is missing: dS = P ∘ (dP − δ)", lambda *x: _exact_grad(*x, through_softmax=False)),
    Mistake(
        "P is missing: dS = P ∘ (dP − δ), and it is 0 for hidden keys",
        lambda *x: _exact_grad(*x, through_softmax=False, sees=in_a_visible_tile(*x[-2:])),
    ),
    Mistake(
        "the last keys are missing: is there a tail that does not fill a tile?",
        lambda *x: _exact_grad(*x, counts=slice(len(x[1]) // x[-1] * x[-1])),
    ),
    Mistake("only one tile of keys counts: dQ is the sum over all that the query sees", _last_tile),
    Mistake("this is dK = dSᵀ Q: dQ is dS K", _grad_k),
]

GRAD_Q = Task(
    "grad_q",
    unit="03_tiling",
    minutes=40,
    difficulty=4,
    parts={
        "result": [
            grad_case(4, 4, 4, asks="one tile: P = exp(S − lse), dP = dO Vᵀ, dS = P ∘ (dP − δ)"),
            grad_case(12, 4, 4, asks="is the sum over all tiles of keys there?"),
            grad_case(13, 4, 6, asks="queries and keys end in different tails"),
            grad_case(20, 8, 4, times=30, asks="does it hold for large scores too?"),
        ],
        "memory": [grad_memory_case()],
    },
)

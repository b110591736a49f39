"""Unit 03, the other task: the gradient of q by recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode

from course.tasks.cases import counted, kind_of_scores, random_rows
from course.tasks.judge import Mistake, call, compare_results, extra_memory_below
from course.tasks.mistakes import Sees, in_a_visible_tile, masked_scores, of_causal_mask, of_delta, of_skipped_tiles
from course.tasks.task import Case, NotYet, Task
from course.tasks.tiling_slips import compare_some_rows, rows_to_compare
from minillm.attention import flash_attention
from minillm.measure import format_bytes

GRAD = {"grad_q": ("query", "dim")}
MEMORY = 8 << 20  # bytes that a call may take where memory is judged
NAN_GRAD = "exp overflows where a hidden key is not masked before it, or where lse is not subtracted"


def grad_case(
    n: int, block_q: int, block_k: int, *, times: float = 1, more: int = 0, d: int = 8, asks: str = ""
) -> Case:
    """The gradient of q for random gradients of out; q is multiplied by `times`.

    With `more`, the forward saw as many keys before the n that the answer is given, as where keys are spread over
    devices: an answer that computes out or lse again from what it has is wrong there.
    """

    def judge(function: Callable, generator: Generator) -> None:
        saved = _saved(n, d, times, more, generator)
        inputs = (*saved, block_q, block_k)
        compare_results(
            call(_without_autograd(function), *inputs),
            inputs,
            exact_grad,
            results=GRAD,
            mistakes=GRAD_MISTAKES,
            asks=asks,
            nan=NAN_GRAD,
            times=times,
            factor=3,
        )

    others = f", out and lse of {counted(more, 'more key')}" if more else ""
    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}{kind_of_scores(times)}{others}", judge)


def grad_memory_case(n: int = 4096, block_q: int = 1024, block_k: int = 64, d: int = 16) -> Case:
    """Tiles of which a whole strip, all keys or all queries, needs far more memory than one."""

    def judge(function: Callable, generator: Generator) -> None:
        saved = _saved(n, d, 1, 0, generator)
        tile, strip, whole = (format_bytes(4 * size) for size in (block_q * block_k, max(block_q, block_k) * n, n * n))
        too_much = (
            f"more is in memory than a few tiles of {block_q} × {block_k} ({tile} each): work with one at a time, "
            f"not with a strip across all {n} keys or queries ({strip}), or the probabilities of the whole sequence "
            f"({whole})"
        )
        result = extra_memory_below(MEMORY, _without_autograd(function), *saved, block_q, block_k, too_much=too_much)
        compare_some_rows(result, rows_to_compare(n), lambda rows, dtype: _some_grads(saved, rows, dtype), GRAD, 3)

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}: memory", judge)


def _saved(n: int, d: int, times: float, more: int, generator: Generator) -> tuple[Tensor, ...]:
    """q, k, v, and what the forward leaves, out and lse; and a gradient of out."""
    q, k, v = random_rows(n, n + more, d, generator)
    q = q * times
    out, lse = flash_attention(
        *(x[None, :, None] for x in (q, k, v)), causal=True, return_lse=True, block_q=512, block_k=512
    )
    grad_out = torch.randn(n, d, generator=generator)
    return q, k[more:].clone(), v[more:].clone(), out[0, :, 0], lse[0, 0], grad_out


def _without_autograd(function: Callable) -> Callable:
    """The answer, and NotYet where it calls autograd."""
    if hasattr(function, "peak_memory"):  # in a process of its own: there, the cases with more keys tell
        return function

    def guarded(*inputs: Any) -> Any:
        with _NoAutograd():
            return function(*inputs)

    guarded.fn = function  # type: ignore[attr-defined]  # `call` looks there for the learner's own lines
    return guarded


class _NoAutograd(TorchFunctionMode):
    """Raises NotYet where a tensor is made that autograd follows."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.requires_grad or _switches_on(func, args):
            raise NotYet("it calls autograd: write the gradient yourself, from P = exp(S − lse) and δ")
        return result


def _switches_on(func: Any, args: tuple) -> bool:
    """Whether this is `x.requires_grad = True`, which returns nothing."""
    return func == Tensor.requires_grad.__set__ and bool(args[1])  # type: ignore[attr-defined]


def exact_grad(
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
    sums: Callable[[Tensor], Tensor] | None = None,
    through_softmax: bool = True,
    counts: slice = slice(None),
) -> Tensor:
    """dS K · scale, all at once; the options are slips that people make."""
    right = q.shape[1] ** -0.5
    scores = masked_scores(q, k, shift=shift, sees=sees)
    p, grad_p = weights(scores, lse[:, None]), grad_out @ v.T
    grad_p = grad_p - delta * (sums(p * grad_p) if sums else (grad_out * out).sum(-1, keepdim=True))
    grad_scores = (p if through_softmax else scores > -torch.inf) * grad_p
    return grad_scores[:, counts] @ k[counts] * (right if scale is None else scale)


def _some_grads(saved: tuple[Tensor, ...], rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of the right gradient, computed in a dtype."""
    q, k, v, out, lse, grad_out = (x.to(dtype) for x in saved)
    scores = masked_scores(q[rows], k, causal=False).masked_fill(torch.arange(len(k)) > rows[:, None], -torch.inf)
    grad_p = grad_out[rows] @ v.T - (grad_out[rows] * out[rows]).sum(-1, keepdim=True)
    return ((scores - lse[rows, None]).exp() * grad_p) @ k * q.shape[1] ** -0.5


def _sum_of_a_tile(block_k: int) -> Callable[[Tensor], Tensor]:
    """δ as the sum over the tile's own keys."""
    return lambda products: torch.cat([x.sum(-1, keepdim=True).expand_as(x) for x in products.split(block_k, 1)], 1)


def _softmax(scores: Tensor, _: Tensor) -> Tensor:
    return scores.softmax(-1)


def _sum_of_all(products: Tensor) -> Tensor:
    return products.sum(-1, keepdim=True)


def _transposed_tiles(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *blocks: int):
    """Each tile of dS transposed, where the shapes allow it."""
    block = blocks[0]
    if block != blocks[1] or len(q) % block:
        return exact_grad(q, k, v, out, lse, grad_out, *blocks)
    scale = q.shape[1] ** -0.5
    grad_p = grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)
    grad_scores = (
        ((masked_scores(q, k) - lse[:, None]).exp() * grad_p).unflatten(0, (-1, block)).unflatten(2, (-1, block))
    )
    return grad_scores.transpose(1, 3).flatten(2).flatten(0, 1) @ k * scale


def _tile_by_tile(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    """Each tile of keys with a softmax of its own."""
    block_k = rest[-1]
    weights = lambda scores, _: torch.cat([x.softmax(-1).nan_to_num(0) for x in scores.split(block_k, dim=1)], dim=1)  # noqa: E731
    return exact_grad(q, k, v, out, lse, *rest, weights=weights)


def _last_tile(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    """For each query, only the last tile of keys that its tile of queries sees."""
    block_q, block_k = rest[-2:]
    result = torch.zeros_like(q)
    for i in range(0, len(q), block_q):
        last = (min(i + block_q, len(k)) - 1) // block_k * block_k
        result[i : i + block_q] = exact_grad(q, k, *rest, counts=slice(last, last + block_k))[i : i + block_q]
    return result


def _grad_k(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, *_: int) -> Tensor:
    """dSᵀ Q · scale."""
    grad_p = grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)
    scores = q @ k.T * q.shape[1] ** -0.5
    return ((scores - lse[:, None]).exp().tril() * grad_p).T @ q * q.shape[1] ** -0.5


GRAD_MISTAKES = [
    *of_delta(exact_grad),
    Mistake(
        "δ is the sum over one tile of keys: it is Σ dO · O of the row, which is the sum over all keys",
        lambda *x: exact_grad(*x, sums=_sum_of_a_tile(x[-1])),
    ),
    Mistake(
        "δ is one number for all rows: each row has its own, the sum of its dO · O",
        lambda *x: exact_grad(*x, sums=lambda _: (x[5] * x[3]).sum()),
    ),
    Mistake(
        "δ is one number for all rows: each row has its own, the sum of its dO · O",
        lambda *x: exact_grad(*x, sums=lambda _: (x[5] * x[3]).sum(-1).mean()),
    ),
    Mistake(
        "δ is the mean of dO · O over a row: it is the sum",
        lambda *x: exact_grad(*x, sums=lambda _: (x[5] * x[3]).mean(-1, keepdim=True)),
    ),
    Mistake(
        "P and δ are those of a softmax over the keys at hand: the forward saw more, so P = exp(S − lse), δ = Σ dO · O",
        lambda *x: exact_grad(*x, weights=_softmax, sums=_sum_of_all),
    ),
    Mistake(
        "P is a softmax over the keys at hand: the forward saw more, so P = exp(S − lse)",
        lambda *x: exact_grad(*x, weights=_softmax),
    ),
    Mistake(
        "δ is a sum over the keys at hand: the forward saw more, so δ = Σ dO · O",
        lambda *x: exact_grad(*x, sums=_sum_of_all),
    ),
    Mistake("dS is transposed in each tile: dQ is the sum of dS K", _transposed_tiles),
    Mistake("the sign is turned: dQ = + dS K / √d", lambda *x: -exact_grad(*x)),
    Mistake(
        "the scale is forgotten: the scores were multiplied by 1/√d, so dQ is too",
        lambda *x: exact_grad(*x, scale=1.0),
    ),
    Mistake("the scale is there twice: dQ = dS K / √d", lambda *x: exact_grad(*x, scale=1 / x[0].shape[1])),
    *of_causal_mask(exact_grad),
    of_skipped_tiles(exact_grad),
    Mistake(
        "the probabilities are not normalised: P = exp(S − lse), lse being saved for that",
        lambda *x: exact_grad(*x, weights=lambda scores, _: scores.exp()),
    ),
    Mistake(
        "the probabilities are not normalised: P = exp(S − lse), with lse and not the row's largest score",
        lambda *x: exact_grad(*x, weights=lambda scores, _: (scores - scores.amax(-1, keepdim=True)).exp()),
    ),
    Mistake(
        "it is a softmax over each tile of keys: P = exp(S − lse), with the lse of the whole row",
        _tile_by_tile,
    ),
    Mistake(
        "the exponentials are in base 2: lse is a natural logarithm",
        lambda *x: exact_grad(*x, weights=lambda scores, lse: (scores - lse).exp2()),
    ),
    Mistake("P is missing: dS = P ∘ (dP − δ)", lambda *x: exact_grad(*x, through_softmax=False)),
    Mistake(
        "P is missing: dS = P ∘ (dP − δ), and it is 0 for hidden keys",
        lambda *x: exact_grad(*x, through_softmax=False, sees=in_a_visible_tile(*x[-2:])),
    ),
    Mistake(
        "the last keys are missing: is there a tail that does not fill a tile?",
        lambda *x: exact_grad(*x, counts=slice(len(x[1]) // x[-1] * x[-1])),
    ),
    Mistake("only one tile of keys counts: dQ is the sum over all that the query sees", _last_tile),
    Mistake("this is dK = dSᵀ Q: dQ is dS K", _grad_k),
]

CHECKLISTS = {
    "why-compute-again": [
        "says what is compared: reading a stored number of P from HBM, and computing it again from tiles on the chip",
        "puts numbers on it: about 2d operations against 2 bytes, or a GPU's operations for each byte that it moves",
        "says which of the two is the limit on today's GPUs: moving bytes, while arithmetic waits",
        "turns it round: with much faster memory and the same arithmetic, reading would win in time",
        "notes what stays: N² numbers need room between forward and backward, however fast the memory is",
    ]
}

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
            grad_case(12, 4, 4, more=5, asks="are P and δ those of the saved lse and out?"),
        ],
        "memory": [grad_memory_case(), grad_memory_case(4096, 64, 1024)],
    },
)

"""Attention of one head with the slips that people make, and the mistakes that several units know.

Each `of_…` returns mistakes of an answer that has the slip as an option, as in `answer(*inputs, scale=1.0)`; the first
of the inputs is q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course.tasks.judge import Mistake

EVERY_KEY = 1 << 30  # a mask that is shifted so far hides nothing

Sees = Callable[[Tensor, Tensor], Tensor]  # queries (n_q, 1) and keys (n_k,), as positions: whether a query sees a key


def masked_scores(
    q: Tensor, k: Tensor, *, causal: bool = True, scale: float | None = None, shift: int = 0, sees: Sees = torch.ge
) -> Tensor:
    """The scaled scores, -inf where a query does not see a key.

    Args:
        q: (n_q, d), the last of the queries: n_q ≤ n_k.
        k: (n_k, d).
        causal: bottom-right aligned; otherwise each query sees all keys.
        scale: 1/√d when left out.
        shift: how many keys too many each query sees.
        sees: the mask, in place of query ≥ key.

    Returns:
        (n_q, n_k).
    """
    scores = q @ k.T * (q.shape[1] ** -0.5 if scale is None else scale)
    if not causal:
        return scores
    keys = torch.arange(len(k))
    return scores.masked_fill(~sees(keys[len(k) - len(q) :, None], keys - shift), -torch.inf)


def online_softmax(
    scores: Tensor,
    v: Tensor,
    block: int,
    *,
    padded: bool = False,
    base: float = math.e,
    rescale_acc: bool = True,
    rescale_l: bool = True,
    divide: bool = True,
    divide_inside: bool = False,
    shared: bool = False,
    log: Callable[[Tensor], Tensor] = torch.log,
) -> tuple[Tensor, Tensor]:
    """The loop over blocks of keys; the options are slips.

    Args:
        scores: (n_q, n_k), -inf where masked.
        v: (n_k, d).
        block: keys at a time.
        padded: the last block is filled up with zeros, and they are not masked.
        divide, divide_inside: by l, in the end; and after each block.
        shared: one largest score for all rows.
        log: of l, for lse.

    Returns:
        out (n_q, d), 0 where a query sees no key; lse (n_q,).
    """
    if padded:
        missing = -len(v) % block
        scores = torch.cat([scores, scores.new_zeros(len(scores), missing)], 1)
        v = torch.cat([v, v.new_zeros(missing, v.shape[1])])
    m, l = scores.new_full((len(scores), 1), -torch.inf), scores.new_zeros(len(scores), 1)
    acc = scores.new_zeros(len(scores), v.shape[1])
    for j in range(0, len(v), block):
        tile = scores[:, j : j + block]
        largest = torch.maximum(m, tile.amax() if shared else tile.amax(-1, keepdim=True))
        finite = largest.masked_fill(largest == -torch.inf, 0)
        p, rescale = base ** (tile - finite), base ** (m - finite)
        l = (rescale if rescale_l else 1) * l + p.sum(-1, keepdim=True)
        acc = (rescale if rescale_acc else 1) * acc + p @ v[j : j + block]
        acc = acc / l if divide_inside else acc
        m = largest
    return (acc / l if divide else acc).nan_to_num(), (m + log(l))[:, 0]


def of_rescale(answer: Callable[..., Any]) -> list[Mistake]:
    """Of the online softmax: options `rescale_acc`, `rescale_l`."""
    return [
        Mistake(
            "acc is not rescaled: when the largest score rises, what was summed before must shrink, acc as well as l",
            lambda *x: answer(*x, rescale_acc=False),
        ),
        Mistake(
            "l is not rescaled: when the largest score rises, what was summed before must shrink, l as well as acc",
            lambda *x: answer(*x, rescale_l=False),
        ),
        Mistake(
            "nothing is rescaled: when the largest score rises, l and acc of all keys before must shrink",
            lambda *x: answer(*x, rescale_l=False, rescale_acc=False),
        ),
    ]


def of_base(answer: Callable[..., Any]) -> Mistake:
    """Of the exponentials: option `base`."""
    return Mistake(
        "the exponentials are in base 2: multiply the scores by log2(e) first, or use exp",
        lambda *x: answer(*x, base=2),
    )


def of_base_2_throughout(answer: Callable[..., Any]) -> Mistake:
    """Of exponentials and logarithm: options `base`, `log`."""
    return Mistake(
        "all is in base 2, lse too: multiply the scores by log2(e) before exp2, and lse by ln 2 in the end",
        lambda *x: answer(*x, base=2, log=torch.log2),
    )


def of_padding(answer: Callable[..., Any]) -> Mistake:
    """Of the tail: option `padded`."""
    return Mistake(
        "the tail is padded and not masked: a key of zeros has score 0, not −∞", lambda *x: answer(*x, padded=True)
    )


def of_division(answer: Callable[..., Any]) -> Mistake:
    """Of the end: option `divide`."""
    return Mistake("the result is not divided by l in the end", lambda *x: answer(*x, divide=False))


def of_division_inside(answer: Callable[..., Any]) -> list[Mistake]:
    """Of the loop: options `divide_inside`, `divide`."""
    message = "acc is divided by l in every block: keep the sum as it is, and divide once, in the end"
    return [Mistake(message, lambda *x, end=end: answer(*x, divide_inside=True, divide=end)) for end in (False, True)]


def of_shared_maximum(answer: Callable[..., Any]) -> Mistake:
    """Of m: option `shared`."""
    return Mistake(
        "m is one number for all rows, and exp of a row far below it is 0: each row has its own largest score",
        lambda *x: answer(*x, shared=True),
    )


def of_scale(answer: Callable[..., Any]) -> list[Mistake]:
    """Of 1/√d: option `scale`."""
    return [
        Mistake("the scale 1/√d is forgotten", lambda *x: answer(*x, scale=1.0)),
        Mistake(
            "the scale is there twice: the scores are divided by d instead of √d",
            lambda *x: answer(*x, scale=1 / x[0].shape[-1]),
        ),
    ]


def of_causal_mask(answer: Callable[..., Any]) -> list[Mistake]:
    """Of the mask: option `shift`, how many keys too many each query sees."""
    return [
        Mistake("there is no causal mask: each query sees all keys", lambda *x: answer(*x, shift=EVERY_KEY)),
        Mistake("your mask is off by one: each query sees one key too many", lambda *x: answer(*x, shift=1)),
        Mistake(
            "your mask is off by one: a query must see the key at its own position too",
            lambda *x: answer(*x, shift=-1),
        ),
    ]


def of_skipped_tiles(answer: Callable[..., Any]) -> Mistake:
    """Of tiles on the diagonal: option `sees`; the last two inputs are block_q and block_k."""
    return Mistake(
        "tiles are skipped and those on the diagonal are not masked: inside them, query i must not see key j > i",
        lambda *x: answer(*x, sees=in_a_visible_tile(*x[-2:])),
    )


def in_a_visible_tile(block_q: int, block_k: int) -> Sees:
    """A mask that hides whole tiles only."""
    return lambda i, j: i // block_q * block_q + block_q > j // block_k * block_k


def of_delta(answer: Callable[..., Any]) -> list[Mistake]:
    """Of dS: option `delta`, the factor of δ."""
    return [
        Mistake(
            "δ is forgotten: dS = P ∘ (dP − δ), with δ the sum of dO · O in each row", lambda *x: answer(*x, delta=0)
        ),
        Mistake("δ is added: dS = P ∘ (dP − δ)", lambda *x: answer(*x, delta=-1)),
    ]


def of_heads(answer: Callable[..., Any], cure: str = "") -> list[Mistake]:
    """Of grouped heads: option `interleaved`; the inputs are q, k, v and others; k and v have heads on axis 2."""
    return [
        Mistake(
            "the query heads are interleaved over the KV heads: neighbours must share one, "
            f"so that heads 0 … g−1 read KV head 0{cure}",
            lambda *x: answer(*x, interleaved=True),
        ),
        Mistake(
            "all query heads read the first KV head: head i reads KV head i // (h // hk)",
            lambda q, k, v, *others: answer(q, k[:, :, :1], v[:, :, :1], *others),
        ),
    ]

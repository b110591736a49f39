"""Unit 05's two loops in PyTorch, tile by tile, with the slips that people make as options; and these by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from course.tasks.judge import Mistake
from course.tasks.mistakes import of_delta

Sees = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # keys (BLOCK,), first and last (n, 1), where the tile begins


def window(n_q: int, n_k: int, left: int, right: int) -> tuple[Tensor, Tensor]:
    """The first and the last key that each query sees, (n_q, 1) each; -1 is no limit."""
    positions = torch.arange(n_q)[:, None] + n_k - n_q
    first = (positions - left).clamp(min=0) if left >= 0 else torch.zeros_like(positions)
    last = (positions + right).clamp(max=n_k - 1) if right >= 0 else torch.full_like(positions, n_k - 1)
    return first, last


def window_attention(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, block: int) -> Tensor:
    """The right result of `forward_loop`'s program: 0 for a query that sees no key."""
    first, last = window(len(q), len(k), left, right)
    keys = torch.arange(len(k))
    scores = (q @ k.T * scale).masked_fill((keys < first) | (keys > last), -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v


def inside(keys: Tensor, first: Tensor, last: Tensor, begin: int) -> Tensor:
    """The right mask."""
    return (keys >= first) & (keys <= last)


def forward_walk(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, block: int, **slips: Any
) -> Tensor:
    """What the program stores with a loop that has the slips of `_one_program`."""
    firsts, lasts = window(len(q), len(k), left, right)
    parts = zip(q.split(block), firsts.split(block), lasts.split(block), strict=True)
    return torch.cat([_one_program(x, first, last, k, v, scale, block, **slips) for x, first, last in parts])


def _one_program(
    q: Tensor,
    first: Tensor,
    last: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    block: int,
    *,
    sees: Sees = inside,
    hidden: float = -torch.inf,
    bases: tuple[float, float] = (math.e, math.e),
    rescaled: str = "l acc",
    carried: bool = True,
    whole_tile: bool = False,
    divided: str = "",
    step: int | None = None,
    row: int | None = None,
    tail: str = "",
) -> Tensor:
    """The online softmax over the tiles of keys; the options are slips.

    Args:
        sees, hidden: the mask, and what a hidden key's score becomes.
        bases: of P and of the rescaling.
        rescaled: what is.
        carried: whether m is.
        whole_tile: whether the largest score is that of all queries.
        divided: by l after each "tile", or "twice" in the end.
        step, row: of the loop, and from one row of k and v to the next, block and d when right.
        tail: where it is left out, a last tile that is not full: of the "walk" or of all "keys".
    """
    n_k, d = k.shape
    k, v = (pad(x, (0, 0, 0, 2 * block)).flatten().as_strided((n_k + block, d), (row or d, 1)) for x in (k, v))
    begin = int(first.min()) // block * block
    stop = int(last.max()) + 1
    stop = {"": stop, "walk": stop // block * block, "keys": min(stop, n_k // block * block)}[tail]
    m, l, acc = q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1), q.new_zeros(len(q), d)
    for j in range(begin, stop, step or block):
        keys = torch.arange(j, j + block)
        k_tile, v_tile = (torch.where((keys < n_k)[:, None], x[j : j + block], 0) for x in (k, v))
        scores = (q @ k_tile.T * scale).masked_fill(~sees(keys, first, last, j), hidden)
        m_new = torch.maximum(m, scores.amax() if whole_tile else scores.amax(-1, keepdim=True))
        shift = m_new.masked_fill(m_new == -torch.inf, 0)
        p, rescale = bases[0] ** (scores - shift), bases[1] ** (m - shift)
        l = l * (rescale if "l" in rescaled else 1) + p.sum(-1, keepdim=True)
        acc = acc * (rescale if "acc" in rescaled else 1) + p @ v_tile
        acc = acc / l.masked_fill(l == 0, 1) if divided == "tile" else acc
        m = m_new if carried else m
    l = l.masked_fill(l == 0, 1)
    return acc / l / l if divided == "twice" else acc / l


def window_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    causal: bool,
    scale: float,
    block: int,
    *,
    scales: tuple[float | None, float | None] = (None, None),
    shift: int | None = 0,
    base: float = math.e,
    lse_factor: float = 1,
    delta_factor: float = 1,
    first_tile: str = "",
    turned: str = "p ds",
    dk_of_p: bool = False,
    dp_of: str = "v",
    row: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 2's formulas for dK and dV; the options are slips.

    Args:
        scales: in place of the scale, of the scores and of dK.
        shift: how many queries too many see each key, None for all.
        base: of P; lse times lse_factor is subtracted, and delta_factor times δ.
        first_tile: which of "lse" and "delta" are the first tile's in every tile.
        turned: which of "p" and "ds" are transposed in their product.
        row: from one row of q and grad_out to the next, d when right.
    """
    n_q, n_k = len(q), len(k)
    lse, delta = _rows(q, k, v, grad_out, causal, scale)
    if row:
        q, grad_out = (x.flatten().as_strided(x.shape, (row, 1)) for x in (q, grad_out))
    q, k, v, grad_out, lse, delta = (pad(x, (0, 0, 0, -len(x) % block)) for x in (q, k, v, grad_out, lse, delta))
    first = torch.arange(len(k)) - (n_k - n_q) if causal else torch.zeros(len(k))
    begin = first.view(-1, block)[:, 0].clamp(min=0) // block * block  # no query before it is visited
    seen = torch.arange(len(q))[:, None] >= begin.repeat_interleave(block)
    seen &= torch.arange(len(q))[:, None] >= (first - shift if shift is not None else -1)
    lse, delta = (_of_first_tile(x, block) if n in first_tile else x for n, x in (("lse", lse), ("delta", delta)))
    p = base ** (q @ k.T * (scale if scales[0] is None else scales[0]) - lse_factor * lse)
    p = p.masked_fill(~seen, 0)
    ds = p * (grad_out @ (v if dp_of == "v" else k).T - delta_factor * delta)
    p_used, ds_used = (x if n in turned.split() else _turned_by_tile(x, block) for n, x in (("p", p), ("ds", ds)))
    grad_k = (p if dk_of_p else ds_used).T @ q * (scale if scales[1] is None else scales[1])
    return grad_k[:n_k], (p_used.T @ grad_out)[:n_k]


def _rows(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The right lse and δ, (n_q, 1) each."""
    scores = q @ k.T * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1 + len(k) - len(q)).bool(), -torch.inf)
    out = scores.softmax(-1) @ v
    return scores.logsumexp(-1, keepdim=True), (out * grad_out).sum(-1, keepdim=True)


def _of_first_tile(x: Tensor, block: int) -> Tensor:
    return x[:block].repeat(len(x) // block, 1)


def _turned_by_tile(x: Tensor, block: int) -> Tensor:
    """Each tile transposed, so that a product with x.T is one with the tiles as they were."""
    tiles = x.view(len(x) // block, block, -1, block)
    return tiles.transpose(1, 3).reshape(x.shape)


def with_slips(**slips: Any) -> Callable[..., Tensor]:
    """`forward_walk` with these slips."""
    return lambda *inputs: forward_walk(*inputs, **slips)


def _seen_where(sees: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return with_slips(sees=sees)


def _other_scale(factor: Callable[[int], float]) -> Callable[..., Tensor]:
    return lambda q, k, v, left, right, _, block: forward_walk(q, k, v, left, right, factor(q.shape[1]), block)


def _other_rows(*inputs: Any) -> Tensor:
    d, block = inputs[0].shape[1], inputs[-1]  # with larger blocks it would read behind the end
    return forward_walk(*inputs, row=block if block < d else d)


def whole_tile(*inputs: Any) -> Tensor:
    """With the largest score of all queries; in fp32, where the others' P are 0."""
    narrow: list[Any] = [x.float() if isinstance(x, Tensor) else x for x in inputs]
    return forward_walk(*narrow, whole_tile=True)


SHRINK = "when the largest score rises, what was summed before must shrink"
# These the lesson's own loop can have too.
OF_RESCALE = [
    Mistake(f"acc is not rescaled: {SHRINK}, acc as well as l", with_slips(rescaled="l")),
    Mistake(f"l is not rescaled: {SHRINK}, l as well as acc", with_slips(rescaled="acc")),
    Mistake(f"nothing is rescaled: {SHRINK}, l and acc of all keys before", with_slips(rescaled="")),
]
OF_SCALE = [
    Mistake("the scale is forgotten: multiply the scores by `scale`", _other_scale(lambda d: 1.0)),
    Mistake("the scale is D ** -0.5: multiply the scores by the argument `scale`", _other_scale(lambda d: d**-0.5)),
]
OF_WHOLE_TILE = Mistake(
    "the largest score is that of the whole tile: each query has its own, tl.max(scores, 1)", whole_tile
)
FORWARD_MISTAKES = [
    Mistake(
        "no key is hidden: the score of key j must be −∞ unless first ≤ j ≤ last, in the tail too",
        _seen_where(lambda keys, first, last, _: keys > -1),
    ),
    Mistake("the mask does not ask for j ≤ last", _seen_where(lambda keys, first, last, _: keys >= first)),
    Mistake(
        "the mask does not ask for j ≤ last",
        lambda *inputs: forward_walk(*inputs, sees=lambda keys, first, *_: (keys >= first) & (keys < len(inputs[1]))),
    ),
    Mistake("the mask does not ask for first ≤ j", _seen_where(lambda keys, first, last, _: keys <= last)),
    Mistake(
        "your mask counts keys from the tile's begin: the tile at j holds keys j, j + 1 …",
        _seen_where(lambda keys, first, last, j: inside(keys - j, first, last, j)),
    ),
    Mistake(
        "your mask is off by one: a query sees its last key too, j ≤ last",
        _seen_where(lambda keys, first, last, j: inside(keys, first, last - 1, j)),
    ),
    Mistake(
        "your mask is off by one: a query sees its first key too, first ≤ j",
        _seen_where(lambda keys, first, last, j: inside(keys, first + 1, last, j)),
    ),
    Mistake(
        "your mask is off by one: each query sees a key behind last",
        _seen_where(lambda keys, first, last, j: inside(keys, first, last + 1, j)),
    ),
    Mistake(
        "your mask is off by one: each query sees a key before first",
        _seen_where(lambda keys, first, last, j: inside(keys, first - 1, last, j)),
    ),
    Mistake("a hidden key has score 0: it must be −∞, so that its weight is 0", with_slips(hidden=0.0)),
    Mistake(
        "a hidden key has a low score and not −∞: a query that sees no key gets a mean of V, and must get 0",
        with_slips(hidden=-1e30),
    ),
    *OF_RESCALE,
    Mistake(
        "m is not carried on: only the last tile counts, because each one starts from m = −∞", with_slips(carried=False)
    ),
    *OF_SCALE,
    Mistake(
        "the exponentials are in base 2: multiply the scores by log2(e) first, or use exp", with_slips(bases=(2, 2))
    ),
    Mistake("P is in base 2, and the rescaling is in base e: one base for both", with_slips(bases=(2, math.e))),
    Mistake("P is in base e, and the rescaling is in base 2: one base for both", with_slips(bases=(math.e, 2))),
    Mistake("acc is divided by l already: the program divides, once, at the end", with_slips(divided="tile")),
    Mistake("acc is divided by l already: the program divides, once, at the end", with_slips(divided="twice")),
    Mistake("the last keys are missing: the loop runs to stop, the tail included", with_slips(tail="walk")),
    Mistake("the last keys are missing: the loop runs to stop, the tail included", with_slips(tail="keys")),
    Mistake(
        lambda *inputs: (
            f"row j of k and v is read at j * {inputs[-1]}: it lies at j * D, here j * {inputs[0].shape[1]}"
        ),
        _other_rows,
    ),
    Mistake(
        "the loop steps by D: a tile has BLOCK keys", lambda *inputs: forward_walk(*inputs, step=inputs[0].shape[1])
    ),
    OF_WHOLE_TILE,
]


def _backward(**slips: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *inputs: window_gradients(*inputs, **slips)


def _other_scales(*factors: Callable[[int, float], float] | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """In place of the scale, by d and the scale: of the scores, and of dK."""
    of_scores, of_dk = factors

    def answer(*x: Any) -> tuple[Tensor, Tensor]:
        d, scale = x[0].shape[1], x[5]
        return window_gradients(*x, scales=(of_scores and of_scores(d, scale), of_dk and of_dk(d, scale)))

    return answer


def _root(d: int, _: float) -> float:
    return d**-0.5


def _other_query_rows(*inputs: Any) -> tuple[Tensor, Tensor]:
    d, block = inputs[0].shape[1], inputs[-1]
    return window_gradients(*inputs, row=block if block < d else d)


BACKWARD_MISTAKES = [
    *of_delta(lambda *x, delta: window_gradients(*x, delta_factor=delta)),
    Mistake("the scale is forgotten in dK: dK = dSᵀ Q · scale", _other_scales(None, lambda d, scale: 1.0)),
    Mistake("the scale is there twice: dK = dSᵀ Q · scale", _other_scales(None, lambda d, scale: scale**2)),
    Mistake("the scale is forgotten in the scores: S = Q Kᵀ · scale", _other_scales(lambda d, scale: 1.0, None)),
    *(
        Mistake("the scale is D ** -0.5: take the argument `scale`", _other_scales(*where))
        for where in ((_root, _root), (_root, None), (None, _root))
    ),
    Mistake("there is no mask: a query before first must not see the key", _backward(shift=None)),
    Mistake("your mask is off by one: the query at first sees the key", _backward(shift=-1)),
    Mistake("your mask is off by one: the query before first does not see it", _backward(shift=1)),
    Mistake("P is not normalised: P = exp(S − lse)", _backward(lse_factor=0)),
    Mistake("P is in base 2: P = exp(S − lse)", _backward(base=2)),
    Mistake(
        "S is in base 2 and lse is not: multiply lse by log2(e) too",
        lambda *x: window_gradients(*x, lse_factor=math.log(2)),
    ),
    Mistake(
        "lse is the first tile's in each tile: the rows of the tile at i are i, i + 1 …", _backward(first_tile="lse")
    ),
    Mistake(
        "δ is the first tile's in each tile: the rows of the tile at i are i, i + 1 …", _backward(first_tile="delta")
    ),
    Mistake(
        "lse and δ are the first tile's in each tile: the rows of the tile at i are i, i + 1 …",
        _backward(first_tile="lse delta"),
    ),
    Mistake("P is not transposed: dV = Pᵀ dO, a row of it for each key (tl.trans)", _backward(turned="ds")),
    Mistake("dS is not transposed: dK = dSᵀ Q · scale, a row of it for each key (tl.trans)", _backward(turned="p")),
    Mistake("P and dS are not transposed: dV = Pᵀ dO, dK = dSᵀ Q · scale (tl.trans)", _backward(turned="")),
    Mistake("dK is made of P: dK = dSᵀ Q · scale", _backward(dk_of_p=True)),
    Mistake("dP is made of K: dP = dO Vᵀ", _backward(dp_of="k")),
    Mistake(
        lambda *inputs: (
            f"row i of q and grad_out is read at i * {inputs[-1]}: it lies at i * D, here i * {inputs[0].shape[1]}"
        ),
        _other_query_rows,
    ),
]

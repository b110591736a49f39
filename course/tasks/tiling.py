"""Unit 03: FlashAttention's forward, judged by what it moves too, and the gradient of q by recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.hbm import Rows, call_in_tiles
from course.tasks.judge import (
    COARSE,
    ELSEWHERE,
    LOW,
    START,
    Mistake,
    compare,
    compare_results,
    extra_memory_below,
    far_below,
    kind_of_scores,
)
from course.tasks.task import Case, NotYet, Task
from minillm.attention import flash_attention
from minillm.attention.masks import Visibility, tiles
from minillm.measure import format_bytes
from minillm.measure.traffic import Traffic

ROWS = {"out": ("query", "dim")}
GRAD = {"grad_q": ("query", "dim")}
NAN_ROW = "−∞ − (−∞) is NaN: m is the largest score of all tiles so far, not of this one alone"
NAN_GRAD = "exp overflows where a hidden key is not masked before it, or where lse is not subtracted"


def forward_case(
    n: int,
    block_q: int,
    block_k: int,
    *,
    times: float = 1,
    rising: bool = False,
    low: bool = False,
    d: int = 8,
    asks: str = "",
) -> Case:
    """Causal attention of n queries to n keys in tiles; q is multiplied by `times`; with `low`, see `far_below`."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = _inputs(n, d, generator, rising)
        q, k = far_below(q, k, generator) if low else (q * times, k)
        out = _forward(function, q, k, v, block_q, block_k, Traffic(_room(block_q, block_k, d)))
        mistakes = [Mistake(words, _blocked(answer, block_q, block_k)) for words, answer in FORWARD_MISTAKES]
        nan = START if low else NAN_ROW
        larger = LOW if low else times
        compare_results(out, (q, k, v), _exact, results=ROWS, mistakes=mistakes, asks=asks, nan=nan, times=larger)

    kind = kind_of_scores(times, rising, low)
    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}{kind}", judge)


def traffic_case(n: int = 333, block_q: int = 16, block_k: int = 4, *, d: int = 16) -> Case:
    """The result, and the bytes that were loaded and stored for it."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = _inputs(n, d, generator)
        traffic = Traffic(_room(block_q, block_k, d))
        out = _forward(function, q, k, v, block_q, block_k, traffic)
        compare_results(out, (q, k, v), _exact, results=ROWS, asks=ELSEWHERE, nan=NAN_ROW, times=COARSE)
        _judge_traffic(traffic, n, d, block_q, block_k)

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}: traffic", judge)


def forward_memory_case(n: int = 4096, block_q: int = 2048, block_k: int = 64, *, d: int = 8) -> Case:
    """Lengths at which the scores of a row of tiles need far more memory than those of one."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = _inputs(n, d, generator)
        words = "the scores of all keys are in memory: keep those of one tile, and m, l and acc"
        memory = {"memory": 16 << 20, "words": words}
        out = _forward(function, q, k, v, block_q, block_k, Traffic(_room(block_q, block_k, d)), **memory)
        some = slice(-8, None)  # the last rows see all keys
        compare_results(out[some], (q[some], k, v), _exact, results=ROWS, asks=ELSEWHERE, nan=NAN_ROW, times=COARSE)

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}: memory", judge)


def _room(block_q: int, block_k: int, d: int) -> int:
    """Bytes of SRAM for a tile of q and its acc, for k and v (the old tiles too while the new come), and scores."""
    return 4 * (2 * block_q * d + 4 * block_k * d + block_q * block_k)


def _forward(
    function: Callable, q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int, traffic: Traffic, **memory: Any
) -> Tensor:
    """What the answer stores, with its tensors in counted HBM; `memory` is for `call_in_tiles`."""
    out = torch.full_like(q, torch.nan)
    *tensors, rows = (Rows(x, name, traffic) for name, x in (("q", q), ("k", k), ("v", v), ("out", out)))
    cure = f"load {block_q} rows of q or {block_k} of k and v at a time, and let go of those that you have used"
    call_in_tiles(function, *tensors, rows, block_q, block_k, cure=cure, **memory)
    if not rows.stored.any():
        raise NotYet("nothing was stored: out.store(tile, slice(i, i + block_q))")
    if not rows.stored.all():
        raise NotYet(f"row {int(rows.stored.int().argmin())} of {len(out)} was never stored: is the tail there?")
    return out


def _judge_traffic(traffic: Traffic, n: int, d: int, block_q: int, block_k: int) -> None:
    """Between what must move at least and a tenth more than the sum over the tiles.

    The lower bound holds for any order and any tiles. Each of the n(n + 1)/2 scores is d products of a number of q
    with one of k, and both are on the chip then; so are, for the values, a row of v and the sums of a row of out.
    Let the later row of the two be the one that came in: it finds at most room / 4 numbers, so a row that comes in
    gives at most as many products, and pairs · d products take pairs · 4d / room rows, of 4d bytes each. A row of
    sums comes in for nothing when it begins, and is stored in the end. An answer that moves less kept more than fits.
    """
    pairs, row, room = n * (n + 1) // 2, 4 * d, _room(block_q, block_k, d)
    least = pairs * row // room * row
    read, written = traffic.read, traffic.written
    for names, moved in (("q and k", read["q"] + read["k"]), ("v and out", read["v"] + written["out"])):
        if moved + read["out"] < least:
            raise NotYet(
                f"only {format_bytes(moved)} of {names} moved, and with {format_bytes(room)} on the chip it takes at "
                f"least {format_bytes(least)}: you keep copies of tiles, or scores, for which there is no room"
            )
    visible = sum(len(keys) for rows in tiles(n, block_q) for keys in Visibility(n, n, True).key_tiles(rows, block_k))
    tile_sum = (2 * n + 2 * visible) * row
    if traffic.total <= 1.1 * tile_sum:
        return
    if written["out"] > 1.1 * n * row:
        why = "out is stored more than once: make the tiles of queries the outer loop, and store each when it is done"
    elif read["q"] > 1.1 * n * row:
        why = "q is loaded more than once: load a tile of queries before the loop over its keys"
    elif read["out"]:
        why = "out is loaded: keep a tile's sums on the chip until it is done"
    else:
        why = "k and v are loaded too often: end the inner loop at the diagonal, and load each tile once in it"
    raise NotYet(f"right, but it moves {traffic.total / tile_sum:.1f} × what the tiles need: {why}")


def _inputs(n: int, d: int, generator: Generator, rising: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(n, d, generator=generator) for _ in range(3))
    if rising:
        towards = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        q, k = 4 * towards + q / 10, towards * torch.linspace(-4, 4, n)[:, None] + k / 100
    return q, k, v


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.T / q.shape[1] ** 0.5
    hidden = ~torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int,
    block_k: int,
    *,
    scale: float | None = None,
    rescale_acc: bool = True,
    rescale_l: bool = True,
    divide: bool = True,
    base: float = math.e,
    sees: Callable[[Tensor, Tensor], Tensor] = torch.ge,
    last: Callable[[int], int] | None = None,
    padded: bool = False,
) -> Tensor:
    """FlashAttention-2's loops, with the options that people get wrong."""
    n, d = q.shape
    missing = -n % block_k if padded else 0
    k, v = (torch.cat([x, x.new_zeros(missing, d)]) for x in (k, v))
    out = torch.zeros_like(q)
    for i in range(0, n, block_q):
        tile, queries = q[i : i + block_q], torch.arange(i, min(n, i + block_q))[:, None]
        m, l = q.new_full((len(tile), 1), -torch.inf), q.new_zeros(len(tile), 1)
        acc = torch.zeros_like(tile)
        for j in range(0, len(k) if last is None else last(i), block_k):
            keys = torch.arange(j, min(len(k), j + block_k))
            scores = tile @ k[keys].T * (d**-0.5 if scale is None else scale)
            scores = scores.masked_fill(~(sees(queries, keys) | (padded & (keys >= n))), -torch.inf)
            largest = torch.maximum(m, scores.amax(-1, keepdim=True))
            shift = largest.masked_fill(largest == -torch.inf, 0)
            p, rescale = base ** (scores - shift), base ** (m - shift)
            l = (rescale if rescale_l else 1) * l + p.sum(-1, keepdim=True)
            acc = (rescale if rescale_acc else 1) * acc + p @ v[keys]
            m = largest
        out[i : i + block_q] = acc / l if divide else acc
    return out.nan_to_num()


def _mask_after(q: Tensor, k: Tensor, v: Tensor, block_q: int, block_k: int) -> Tensor:
    visible = torch.ones(len(q), len(k)).to(q.dtype).tril()
    return ((q @ k.T / q.shape[1] ** 0.5).softmax(-1) * visible) @ v


def _blocked(answer: Callable, block_q: int, block_k: int) -> Callable[..., Tensor]:
    return lambda q, k, v: answer(q, k, v, block_q, block_k)


FORWARD_MISTAKES: list[tuple[str, Callable]] = [
    (
        "acc is not rescaled: when the largest score rises, what was summed before must shrink, acc as well as l",
        lambda *x: _walk(*x, rescale_acc=False),
    ),
    (
        "l is not rescaled: when the largest score rises, what was summed before must shrink, l as well as acc",
        lambda *x: _walk(*x, rescale_l=False),
    ),
    (
        "nothing is rescaled: when the largest score rises, l and acc of the tiles before must shrink",
        lambda *x: _walk(*x, rescale_l=False, rescale_acc=False),
    ),
    ("there is no causal mask: each query sees all keys", lambda *x: _walk(*x, sees=lambda i, j: i >= j - len(x[1]))),
    (
        "your mask is off by one: a query must see the key at its own position too",
        lambda *x: _walk(*x, sees=torch.gt),
    ),
    (
        "your mask is off by one: each query sees one key too many",
        lambda *x: _walk(*x, sees=lambda i, j: i >= j - 1),
    ),
    (
        "tiles are skipped and those on the diagonal are not masked: inside them, query i must not see key j > i",
        lambda *x: _walk(*x, sees=lambda i, j: i >= j - len(x[1]), last=lambda i: min(len(x[1]), i + x[3])),
    ),
    (
        "the mask counts rows of the tile from 0: row r is query i + r, and column c is key j + c",
        lambda *x: _walk(*x, sees=lambda i, j: i - i[0] >= j - j[0]),
    ),
    (
        "the mask on the diagonal counts rows of the tile from 0: row r is query i + r, and column c is key j + c",
        lambda *x: _walk(
            *x,
            sees=lambda i, j: (j[-1] <= i[0]) | (i - i[0] >= j - j[0]),
            last=lambda i: min(len(x[1]), i + x[3]),
        ),
    ),
    (
        "the walk ends before the diagonal: queries i … i + block_q − 1 see the keys up to i + block_q − 1",
        lambda *x: _walk(*x, last=lambda i: max(i, 1)),
    ),
    ("you mask after the softmax: the rows no longer add up to 1", _mask_after),
    ("the tail is padded and not masked: a key of zeros has score 0, not −∞", lambda *x: _walk(*x, padded=True)),
    (
        "the exponentials are in base 2: multiply the scores by log2(e) first, or use exp",
        lambda *x: _walk(*x, base=2),
    ),
    ("the scale 1/√d is forgotten", lambda *x: _walk(*x, scale=1.0)),
    (
        "the scale is there twice: the scores are divided by d instead of √d",
        lambda *x: _walk(*x, scale=1 / x[0].shape[1]),
    ),
    ("the result is not divided by l in the end", lambda *x: _walk(*x, divide=False)),
]


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

    magnitude = f", scores × {times:g}" if times != 1 else ""
    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}{magnitude}", judge)


def grad_memory_case(n: int = 4096, block_q: int = 128, block_k: int = 512, d: int = 16) -> Case:
    """A length at which all probabilities need far more memory than those of a row of tiles."""

    def judge(function: Callable, generator: Generator) -> None:
        saved = _saved(n, d, 1, generator)
        words = "probabilities of the whole sequence are in memory: compute each tile again when it is needed"
        result = extra_memory_below(24 << 20, function, *saved, block_q, block_k, words=words)
        some = slice(-8, None)  # the last rows see all keys
        q, k, v, out, lse, grad_out = saved
        rows = (q[some], k, v, out[some], lse[some], grad_out[some], block_q, block_k)
        result = result[some] if isinstance(result, Tensor) and len(result) == n else result
        compare_results(result, rows, _exact_grad, results=GRAD, asks=ELSEWHERE, factor=3, times=COARSE)

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}: memory", judge)


def _saved(n: int, d: int, times: float, generator: Generator) -> tuple[Tensor, ...]:
    """q, k, v, and what the forward leaves: out and lse; and a gradient of out."""
    q, k, v = _inputs(n, d, generator)
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
    sees: Callable[[Tensor, Tensor], Tensor] = torch.ge,
    weights: Callable[[Tensor, Tensor], Tensor] = lambda scores, lse: (scores - lse).exp(),
    through_softmax: bool = True,
    counts: slice = slice(None),
) -> Tensor:
    """dS K · scale, all at once; the options are what people get wrong."""
    right, key = q.shape[1] ** -0.5, torch.arange(len(k))
    visible = sees(key[len(k) - len(q) :, None], key)
    scores = (q @ k.T * right).masked_fill(~visible, -torch.inf)
    grad_p = grad_out @ v.T - delta * (grad_out * out).sum(-1, keepdim=True)
    grad_scores = (weights(scores, lse[:, None]) if through_softmax else visible) * grad_p
    return grad_scores[:, counts] @ k[counts] * (right if scale is None else scale)


def _tile_by_tile(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    """Each tile of keys with a softmax of its own."""
    block_k = rest[-1]
    weights = lambda scores, _: torch.cat([x.softmax(-1).nan_to_num(0) for x in scores.split(block_k, dim=1)], dim=1)  # noqa: E731
    return _exact_grad(q, k, v, out, lse, *rest, weights=weights)


def _in_a_visible_tile(inputs: tuple) -> Callable[[Tensor, Tensor], Tensor]:
    block_q, block_k = inputs[-2:]
    return lambda i, j: i // block_q * block_q + block_q > j // block_k * block_k


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
    Mistake(
        "δ is forgotten: dS = P ∘ (dP − δ), with δ the sum of dO · O in each row",
        lambda *x: _exact_grad(*x, delta=0),
    ),
    Mistake("δ is added: dS = P ∘ (dP − δ)", lambda *x: _exact_grad(*x, delta=-1)),
    Mistake(
        "the scale is forgotten: the scores were multiplied by 1/√d, so dQ is too",
        lambda *x: _exact_grad(*x, scale=1.0),
    ),
    Mistake("the scale is there twice: dQ = dS K / √d", lambda *x: _exact_grad(*x, scale=1 / x[0].shape[1])),
    Mistake(
        "there is no causal mask: hidden keys take part in the gradient",
        lambda *x: _exact_grad(*x, sees=lambda i, j: i >= j - len(x[1])),
    ),
    Mistake(
        "tiles are skipped and those on the diagonal are not masked: inside them, query i must not see key j > i",
        lambda *x: _exact_grad(*x, sees=_in_a_visible_tile(x)),
    ),
    Mistake(
        "your mask is off by one: a query must see the key at its own position too",
        lambda *x: _exact_grad(*x, sees=torch.gt),
    ),
    Mistake(
        "your mask is off by one: each query sees one key too many",
        lambda *x: _exact_grad(*x, sees=lambda i, j: i >= j - 1),
    ),
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
        lambda *x: _exact_grad(*x, through_softmax=False, sees=_in_a_visible_tile(x)),
    ),
    Mistake(
        "the last keys are missing: is there a tail that does not fill a tile?",
        lambda *x: _exact_grad(*x, counts=slice(len(x[1]) // x[-1] * x[-1])),
    ),
    Mistake("only one tile of keys counts: dQ is the sum over all that the query sees", _last_tile),
    Mistake("this is dK = dSᵀ Q: dQ is dS K", _grad_k),
]

TASKS = [
    Task(
        "flash_forward",
        unit="03_tiling",
        minutes=45,
        difficulty=3,
        parts={
            "result": [
                forward_case(4, 4, 4, asks="one tile: is it causal attention?"),
                forward_case(16, 4, 4, asks="row r and column c of a tile are query i + r and key j + c"),
                forward_case(12, 6, 2, asks="the tiles need not be square"),
            ],
            "tail": [
                forward_case(10, 4, 4, asks="the last tiles have 2 rows"),
                forward_case(7, 16, 16, asks="the only tile has 7 rows"),
                forward_case(13, 4, 6, asks="queries and keys end in different tails"),
            ],
            "numbers": [
                forward_case(120, 16, 16, rising=True, asks="each tile has a new largest score"),
                forward_case(20, 8, 4, times=30, asks="does it hold for large scores too?"),
                forward_case(12, 4, 4, low=True, asks="the largest score of a row may lie far below 0"),
            ],
            "traffic": [traffic_case(), forward_memory_case()],
        },
    ),
    Task(
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
    ),
]

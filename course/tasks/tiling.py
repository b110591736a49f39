"""Unit 03: FlashAttention's forward, judged by the bytes that it moves too; `tiling_gradient` has the other task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.cases import COARSE, ELSEWHERE, LOW, START, far_below, kind_of_scores, random_rows
from course.tasks.hbm import Rows, call_in_tiles
from course.tasks.judge import Mistake, compare_results
from course.tasks.mistakes import (
    Sees,
    in_a_visible_tile,
    masked_scores,
    of_base,
    of_causal_mask,
    of_division,
    of_padding,
    of_rescale,
    of_scale,
    of_skipped_tiles,
    online_softmax,
)
from course.tasks.task import Case, NotYet, Task
from course.tasks.tiling_gradient import CHECKLISTS, GRAD_Q
from course.tasks.tiling_slips import WALK_MISTAKES, compare_some_rows, rows_to_compare
from minillm.attention.masks import Visibility, tiles
from minillm.measure import format_bytes
from minillm.measure.traffic import Traffic

__all__ = ["CHECKLISTS", "TASKS", "forward_case", "forward_memory_case", "traffic_case"]

ROWS = {"out": ("query", "dim")}
NAN_ROW = (
    "−∞ − (−∞), 0 / 0 and 0 · ∞ are NaN: is m the largest score so far of each row, not of this tile alone, and the "
    "factor of the old sums exp(m − m_new)?"
)
NAN_TURNS = "a row near −400 stands beside one near 400 here: m is a number for each row, and starts at −∞"


def forward_case(
    n: int,
    block_q: int,
    block_k: int,
    *,
    times: float = 1,
    rising: bool = False,
    low: bool = False,
    by_turns: bool = False,
    d: int = 8,
    asks: str = "",
) -> Case:
    """Causal attention of n queries to n keys in tiles.

    Args:
        n, block_q, block_k, d: sizes.
        times: q is multiplied by it.
        rising: each score of a row is larger than the one before.
        low: all scores lie near -LOW, see `far_below`.
        by_turns: those of every other row lie near +LOW, the rest near -LOW.
        asks: a question to ask where the mistake is not known.
    """

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n, n, d, generator, rising)
        q, k = far_below(q, k, generator) if low or by_turns else (q * times, k)
        if by_turns:
            q[1::2] *= -1
        out = _forward(function, q, k, v, block_q, block_k, Traffic(_room(block_q, block_k, d)))
        nan = START if low else NAN_TURNS if by_turns else NAN_ROW
        larger = LOW if low or by_turns else times
        inputs = (q, k, v, block_q, block_k)
        compare_results(out, inputs, _exact, results=ROWS, mistakes=FORWARD_MISTAKES, asks=asks, nan=nan, times=larger)

    kind = f", scores near −{LOW} and {LOW} by turns" if by_turns else kind_of_scores(times, rising, low)
    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}{kind}", judge)


def traffic_case(n: int = 333, block_q: int = 16, block_k: int = 4, *, d: int = 16) -> Case:
    """The result, and the bytes that were loaded and stored for it."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n, n, d, generator)
        traffic = Traffic(_room(block_q, block_k, d))
        out = _forward(function, q, k, v, block_q, block_k, traffic)
        compare_results(
            out, (q, k, v, block_q, block_k), _exact, results=ROWS, asks=ELSEWHERE, nan=NAN_ROW, times=COARSE
        )
        _judge_traffic(traffic, n, d, block_q, block_k)

    return Case(f"{n} queries and keys, tiles of {block_q} × {block_k}: traffic", judge)


def forward_memory_case(n: int = 4096, block_q: int = 2048, block_k: int = 64, *, d: int = 8) -> Case:
    """Lengths at which the scores of a row of tiles need far more memory than those of one."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n, n, d, generator)
        too_much = "the scores of all keys are in memory: keep those of one tile, and m, l and acc"
        memory = {"memory": 16 << 20, "too_much": too_much}
        out = _forward(function, q, k, v, block_q, block_k, Traffic(_room(block_q, block_k, d)), **memory)
        compare_some_rows(out, rows_to_compare(n), partial(_exact_rows, q, k, v), ROWS)

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


def _exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Some rows of the result, computed in a dtype."""
    q, k, v = q[rows].to(dtype), k.to(dtype), v.to(dtype)
    scores = masked_scores(q, k, causal=False).masked_fill(torch.arange(len(k)) > rows[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def _exact(q: Tensor, k: Tensor, v: Tensor, *_: int) -> Tensor:
    return masked_scores(q, k).softmax(-1) @ v


def _loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int,
    block_k: int,
    *,
    scale: float | None = None,
    shift: int = 0,
    sees: Sees = torch.ge,
    **slips: Any,
) -> Tensor:
    """FlashAttention-2's inner loop for all queries at once, with the slips of `online_softmax`."""
    return online_softmax(masked_scores(q, k, scale=scale, shift=shift, sees=sees), v, block_k, **slips)[0]


def _mask_after(q: Tensor, k: Tensor, v: Tensor, *_: int) -> Tensor:
    visible = torch.ones(len(q), len(k)).to(q.dtype).tril()
    return (masked_scores(q, k, causal=False).softmax(-1) * visible) @ v


def _counted_from_0(block_q: int, block_k: int) -> Sees:
    return lambda i, j: i % block_q >= j % block_k


def _counted_from_0_until_the_diagonal(block_q: int, block_k: int) -> Sees:
    return lambda i, j: in_a_visible_tile(block_q, block_k)(i, j) & _counted_from_0(block_q, block_k)(i, j)


def _counted_from_0_on_the_diagonal(n: int, block_q: int, block_k: int) -> Sees:
    def sees(i: Tensor, j: Tensor) -> Tensor:
        below = (j // block_k * block_k + block_k).clamp(max=n) <= i // block_q * block_q + 1
        visible = in_a_visible_tile(block_q, block_k)(i, j)
        return visible & (below | _counted_from_0(block_q, block_k)(i, j))

    return sees


def _before_the_diagonal(block_q: int, block_k: int) -> Sees:
    return lambda i, j: (i >= j) & (j // block_k * block_k < (i // block_q * block_q).clamp(min=1))


FORWARD_MISTAKES = [
    *of_rescale(_loop),
    *of_causal_mask(_loop),
    of_skipped_tiles(_loop),
    Mistake(
        "the mask counts rows of the tile from 0: row r is query i + r, and column c is key j + c",
        lambda *x: _loop(*x, sees=_counted_from_0(*x[3:])),
    ),
    Mistake(
        "the mask counts rows of the tile from 0: row r is query i + r, and column c is key j + c",
        lambda *x: _loop(*x, sees=_counted_from_0_until_the_diagonal(*x[3:])),
    ),
    Mistake(
        "the mask on the diagonal counts rows of the tile from 0: row r is query i + r, and column c is key j + c",
        lambda *x: _loop(*x, sees=_counted_from_0_on_the_diagonal(len(x[0]), *x[3:])),
    ),
    Mistake(
        "the walk ends before the diagonal: queries i … i + block_q − 1 see the keys up to i + block_q − 1",
        lambda *x: _loop(*x, sees=_before_the_diagonal(*x[3:])),
    ),
    Mistake("you mask after the softmax: the rows no longer add up to 1", _mask_after),
    of_padding(_loop),
    of_base(_loop),
    *of_scale(_loop),
    of_division(_loop),
    *WALK_MISTAKES,
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
                forward_case(16, 4, 8, asks="the tiles need not be square"),
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
                forward_case(12, 4, 4, by_turns=True, asks="each row has its own largest score"),
            ],
            "traffic": [traffic_case(), forward_memory_case()],
        },
    ),
    GRAD_Q,
]

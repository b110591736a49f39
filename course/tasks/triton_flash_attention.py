"""Unit 05: the inner loops of a Triton kernel, forward and backward. `triton_programs` has what is around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted, kind_of_scores, lengths, random_rows
from course.tasks.judge import call, compare_results
from course.tasks.task import Case, NotYet, Task
from course.tasks.triton_slips import BACKWARD_MISTAKES, FORWARD_MISTAKES, window, window_attention, window_gradients

ROWS = {"out": ("query", "dim")}
GRADS = {"grad_k": ("key", "dim"), "grad_v": ("key", "dim")}
APART = 200  # how far the scores of every other query lie below those of its neighbours, where rows are `apart`


def forward_case(
    n_q: int,
    n_k: int,
    *,
    left: int = -1,
    right: int = -1,
    d: int = 32,
    block: int = 16,
    scale: float = 0.3,
    times: float = 1,
    rising: bool = False,
    apart: bool = False,
    asks: str = "",
):
    """One head; q is multiplied by `times`; with `rising`, each score is larger than the last."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n_q, n_k, d, generator, rising)
        q, k = rows_apart(q, k, scale) if apart else (q * times, k)
        inputs = (q, k, v, left, right, scale, block)
        (out,), seen = _launched("forward", function, *inputs)
        compare_results(
            out,
            inputs,
            window_attention,
            results=ROWS,
            mistakes=FORWARD_MISTAKES,
            asks=asks,
            nan=_nan_out(n_q, n_k, left, right, block),
            times=APART / 4 if apart else times,
        )
        _judge_work(seen, *_forward_works(n_q, n_k, left, right, d, block))

    kind = ", every other query's scores are far below" if apart else kind_of_scores(times, rising)
    return Case(f"{lengths(n_q, n_k)}, {_sees(left, right)}{_sizes(d, block)}{kind}", judge)


def backward_case(
    n_q: int, n_k: int, *, causal: bool = False, d: int = 32, block: int = 16, scale: float = 0.3, asks: str = ""
) -> Case:
    """A comparison of `backward_program` on random inputs, gradients and counted launches included."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n_q, n_k, d, generator)
        grad_out = torch.randn(n_q, d, generator=generator)
        inputs = (q, k, v, grad_out, causal, scale, block)
        grads, seen = _launched("backward", function, *inputs)
        compare_results(
            grads,
            inputs,
            window_gradients,
            results=GRADS,
            mistakes=BACKWARD_MISTAKES,
            asks=asks,
            nan=NAN_GRAD,
            factor=3,
        )
        _judge_work(seen, *_backward_works(n_q, n_k, causal, d, block))

    return Case(f"{lengths(n_q, n_k)}, {'causal' if causal else 'no mask'}{_sizes(d, block)}", judge)


UNDEFINED = "a masked tl.load without other= is undefined, and NaN here"
NAN_GRAD = f"exp overflows where a hidden key is not masked, or where lse is not subtracted; or {UNDEFINED}"


def _nan_out(n_q: int, n_k: int, left: int, right: int, block: int) -> str:
    """What may make NaN: in this case, is there a query whose first tile shows it no key?"""
    tiles = zip(*(x.split(block) for x in window(n_q, n_k, left, right)), strict=True)
    if any(((first >= first.min() // block * block + block) | (first > last)).any() for first, last in tiles):
        return (
            "while a query has seen no key, m is −∞, and −∞ − (−∞) is NaN: subtract 0 there. "
            f"Or exp overflows where m falls; or {UNDEFINED}"
        )
    return f"exp overflows where m is no maximum, or falls; or {UNDEFINED}"


def _sees(left: int, right: int) -> str:
    before = "all keys before it" if left < 0 else f"{left} keys before it" if left else "no key before it"
    if right < 0:
        return "no mask" if left < 0 else f"each sees {before}, and all behind"
    return "causal" if (left, right) == (-1, 0) else f"each sees {before}, {right} behind"


def _sizes(d: int, block: int) -> str:
    return f", D {d}, BLOCK {block}"


def rows_apart(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every other query gets scores that lie APART lower."""
    towards = torch.nn.functional.normalize(torch.ones(q.shape[1]), dim=0)
    q, k = (x - (x @ towards)[:, None] * towards for x in (q, k))
    q[1::2] -= APART / (4 * scale) * towards
    return q, k + 4 * towards


class Work(NamedTuple):
    """What the visible tiles take: calls of tl.dot, and numbers that are loaded, at least and at most."""

    dots: int
    least: int
    most: int


def _forward_works(n_q: int, n_k: int, left: int, right: int, d: int, block: int) -> tuple[Work, dict[int, str]]:
    """Two products a tile; its keys and values, of which the tiles at the window's ends need some only."""
    bounds = [
        (int(first.min()) // block * block, max(0, int(last.max()) + 1), int(first.min()))
        for first, last in zip(*(x.split(block) for x in window(n_q, n_k, left, right)), strict=True)
    ]
    tiles = [max(0, -(-(stop - begin) // block)) for begin, stop, _ in bounds]
    around = n_q * d  # the program's own
    work = Work(
        dots=2 * sum(tiles),
        least=around + 2 * d * sum(max(0, stop - first) for _, stop, first in bounds),
        most=around
        + 2 * d * sum(max(0, min(n_k - b[0], block * count)) for b, count in zip(bounds, tiles, strict=True)),
    )
    ceil = [(-(-stop // block), -(-(n_k - begin) // block), -(-n_k // block)) for begin, stop, _ in bounds]
    from_0, to_end, both = (2 * sum(counts) for counts in zip(*ceil, strict=True))
    narrow = 2 * sum(max(0, -(-(stop - begin) // 16)) for begin, stop, _ in bounds)
    return work, {
        from_0: "that is all tiles from key 0 on: begin at `begin`",
        to_end: "that is all tiles up to the last key: stop at `stop`",
        both: "that is every tile of keys: walk from `begin` to `stop`",
        narrow: NARROW,
    }


NARROW = "that is a tile every 16 rows: a tile has BLOCK rows, whatever that is"


def _backward_works(n_q: int, n_k: int, causal: bool, d: int, block: int) -> tuple[Work, dict[int, str]]:
    """Four products a tile; its queries, their gradients, lse and δ."""
    firsts = [max(0, j - (n_k - n_q)) if causal else 0 for j in range(0, n_k, block)]
    begins = [first // block * block for first in firsts]
    around = 2 * n_k * d
    work = Work(
        dots=4 * sum(-(-(n_q - begin) // block) for begin in begins),
        least=around + 2 * d * sum(n_q - first for first in firsts),
        most=around + (2 * d + 2) * sum(n_q - begin for begin in begins),
    )
    return work, {
        4 * len(begins) * -(-n_q // block): "that is every tile of queries: begin at `begin`",
        4 * sum(-(-(n_q - begin) // 16) for begin in begins): NARROW,
    }


def _launched(program: str, loop: Callable, *inputs: Any) -> tuple[Any, tuple[int, int]]:
    """What the program stores with this loop in it, and what the interpreter saw: dots, and numbers loaded."""

    def through(loop: Any, *inputs: Any) -> list:
        if hasattr(loop, "launch"):  # graded in a process of its own
            return loop.launch(program, *inputs)
        from course.tasks import triton_programs

        return triton_programs.launch(program, loop, *inputs)

    *results, dots, loaded = call(loop, *inputs, through=through)
    return results, (dots, loaded)


def _judge_work(seen: tuple[int, int], work: Work, slips: dict[int, str]) -> None:
    """Whether the products and the loads of the visible tiles, and no others, were done in Triton."""
    dots, loaded = seen
    if dots < work.dots or loaded < work.least:
        raise NotYet(
            f"right, but with {counted(dots, 'call')} of tl.dot and {loaded} numbers loaded, where the tiles take "
            f"{work.dots} and {work.least}: tl.load and tl.dot must do the work, in a loop over the tiles"
        )
    if dots > work.dots:
        slip = slips.get(dots, "skip those that no query sees, and compute each product once")
        raise NotYet(
            f"right, but with {counted(dots, 'call')} of tl.dot, where the visible tiles take {work.dots}: {slip}"
        )
    if loaded > 1.1 * work.most:
        raise NotYet(f"right, but it loads {loaded} numbers, where the visible tiles have {work.most}: load each once")


TASKS = [
    Task(
        "forward_loop",
        unit="05_triton_flash_attention",
        minutes=40,
        difficulty=3,
        parts={
            "result": [
                forward_case(16, 16, asks="one tile of each: scores, softmax, values"),
                forward_case(32, 64, asks="four tiles of keys: is the online softmax right?"),
                forward_case(32, 64, d=16, block=32, asks="D is 16 and BLOCK is 32 here"),
            ],
            "tail": [
                forward_case(5, 9, asks="one tile, not full"),
                forward_case(20, 43, asks="the third tile has 11 keys"),
            ],
            "window": [
                forward_case(40, 43, right=0, asks="last is a row of numbers, one a query"),
                forward_case(40, 75, left=20, right=0, asks="first is one too, and the walk begins at begin"),
                forward_case(30, 60, left=3, right=5, d=16, block=32, asks="few keys of each tile are seen"),
                forward_case(24, 10, right=0, asks="the first 14 queries see no key: out is 0"),
            ],
            "numbers": [
                forward_case(9, 150, rising=True, asks="each tile has a new largest score"),
                forward_case(17, 40, times=100, asks="does it hold for large scores too?"),
                forward_case(17, 40, left=18, right=0, times=30),
                forward_case(16, 40, apart=True, asks="each query has its own largest score"),
            ],
        },
    ),
    Task(
        "backward_loop",
        unit="05_triton_flash_attention",
        minutes=50,
        difficulty=4,
        parts={
            "result": [
                backward_case(16, 16, asks="one tile: P = exp(S − lse), dP = dO Vᵀ, dS = P ∘ (dP − δ)"),
                backward_case(48, 32, asks="is the sum over all tiles of queries there?"),
                backward_case(64, 32, d=16, block=32, asks="D is 16 and BLOCK is 32 here"),
            ],
            "tail": [backward_case(21, 9), backward_case(5, 40)],
            "causal": [
                backward_case(16, 16, causal=True, asks="query i sees the key where i ≥ first"),
                backward_case(40, 43, causal=True, asks="first is a row of numbers, one a key"),
            ],
        },
    ),
]

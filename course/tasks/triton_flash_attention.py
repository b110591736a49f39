"""Unit 05: the inner loops of a Triton kernel, forward and backward. `triton_programs` has what is around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted, kind_of_scores, lengths, random_rows
from course.tasks.judge import Mistake, call, compare_results
from course.tasks.mistakes import EVERY_KEY, masked_scores, of_base, of_delta, of_rescale, online_softmax
from course.tasks.task import Case, NotYet, Task

BLOCK = 16  # queries and keys in a tile, as in `triton_programs`
ROWS = {"out": ("query", "dim")}
GRADS = {"grad_k": ("key", "dim"), "grad_v": ("key", "dim")}


def forward_case(n_q: int, n_k: int, *, causal: bool = False, times: float = 1, rising: bool = False, asks: str = ""):
    """One head, d = 16; q is multiplied by `times`; with `rising`, each score is larger than the last."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n_q, n_k, 16, generator, rising)
        nan = "is −∞ minus −∞ computed for a row that sees no key yet, or is l still 0?"
        inputs = (q * times, k, v, causal)
        out, seen = _launched("forward", function, *inputs)
        compare_results(out, inputs, _exact, results=ROWS, mistakes=FORWARD_MISTAKES, asks=asks, nan=nan, times=times)
        _judge_work(seen, _forward_work(n_q, n_k, causal))

    mask = "causal" if causal else "no mask"
    return Case(f"{lengths(n_q, n_k)}, {mask}{kind_of_scores(times, rising)}", judge)


def backward_case(n_q: int, n_k: int, *, causal: bool = False, asks: str = "") -> Case:
    """A comparison of `backward_program` on random inputs, gradients and counted launches included."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = random_rows(n_q, n_k, 16, generator)
        grad_out = torch.randn(n_q, 16, generator=generator)
        inputs = (q, k, v, grad_out, causal)
        grads, seen = _launched("backward", function, *inputs)
        compare_results(
            grads, inputs, _exact_grads, results=GRADS, mistakes=BACKWARD_MISTAKES, asks=asks, nan=NAN_GRAD, factor=3
        )
        _judge_work(seen, _backward_work(n_q, n_k, causal))

    return Case(f"{lengths(n_q, n_k)}, {'causal' if causal else 'no mask'}", judge)


NAN_GRAD = "exp overflows where a hidden key is not masked, or where lse is not subtracted"


class Work(NamedTuple):
    """What the visible tiles take: calls of tl.dot, and numbers that are loaded, at least and at most."""

    dots: int
    least: int
    most: int


def _forward_work(n_q: int, n_k: int, causal: bool, d: int = 16) -> Work:
    """Two products a tile; its keys and values, of which the tile on the diagonal needs some only."""
    stops = [min(i + BLOCK, n_q) + n_k - n_q if causal else n_k for i in range(0, n_q, BLOCK)]
    tiles = [-(-stop // BLOCK) for stop in stops]
    around = n_q * d  # the program's own
    return Work(
        dots=2 * sum(tiles),
        least=around + 2 * d * sum(stops),
        most=around + 2 * d * sum(min(n_k, BLOCK * count) for count in tiles),
    )


def _backward_work(n_q: int, n_k: int, causal: bool, d: int = 16) -> Work:
    """Four products a tile; its queries, their gradients, lse and δ."""
    firsts = [max(0, j - (n_k - n_q)) if causal else 0 for j in range(0, n_k, BLOCK)]
    begins = [first // BLOCK * BLOCK for first in firsts]
    around = 2 * n_k * d
    return Work(
        dots=4 * sum(-(-(n_q - begin) // BLOCK) for begin in begins),
        least=around + 2 * d * sum(n_q - first for first in firsts),
        most=around + (2 * d + 2) * sum(n_q - begin for begin in begins),
    )


def _launched(program: str, loop: Callable, *inputs: Any) -> tuple[Any, tuple[int, int]]:
    """What the program stores with this loop in it, and what the interpreter saw: dots, and numbers loaded."""

    def through(loop: Any, *inputs: Any) -> list:
        if hasattr(loop, "launch"):  # graded in a process of its own
            return loop.launch(program, *inputs)
        from course.tasks import triton_programs

        return triton_programs.launch(program, loop, *inputs)

    *results, dots, loaded = call(loop, *inputs, through=through)
    return results, (dots, loaded)


def _judge_work(seen: tuple[int, int], work: Work) -> None:
    """Whether the products and the loads of the visible tiles, and no others, were done in Triton."""
    dots, loaded = seen
    if dots < work.dots or loaded < work.least:
        raise NotYet(
            f"right, but with {counted(dots, 'call')} of tl.dot and {loaded} numbers loaded, where the tiles take "
            f"{work.dots} and {work.least}: tl.load and tl.dot must do the work, in a loop over the tiles"
        )
    if dots > work.dots:
        raise NotYet(
            f"right, but with {counted(dots, 'call')} of tl.dot, where the visible tiles take {work.dots}: "
            "skip those that no query sees, and compute each product once"
        )
    if loaded > 1.1 * work.most:
        raise NotYet(
            f"right, but it loads {loaded} numbers, where the visible tiles have {work.most}: load each once, "
            "and nothing behind the last row (mask=)"
        )


def _exact(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return masked_scores(q, k, causal=causal).softmax(-1) @ v


def _loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    *,
    scale: float | None = None,
    shift: int = 0,
    tail: bool = True,
    **slips: Any,
) -> Tensor:
    """The loop over tiles of keys, with the slips of `online_softmax`."""
    scores = masked_scores(q, k, causal=causal, scale=scale, shift=shift)
    stop = len(k) if tail else len(k) // BLOCK * BLOCK
    return online_softmax(scores[:, :stop], v[:stop], BLOCK, **slips)[0]


FORWARD_MISTAKES = [
    Mistake("there is no mask: key j is seen where j ≤ last", lambda q, k, v, _: _loop(q, k, v, False)),
    Mistake(
        "there is no mask: the tail is loaded as zeros, and a key of zeros has score 0, not −∞",
        lambda q, k, v, _: _loop(q, k, v, False, padded=True),
    ),
    Mistake("your mask is off by one: a query sees its last key too, j ≤ last", lambda *x: _loop(*x, shift=-1)),
    Mistake("your mask is off by one: each query sees one key too many", lambda *x: _loop(*x, shift=1)),
    *of_rescale(_loop),
    Mistake("the scale is forgotten: multiply the scores by it", lambda *x: _loop(*x, scale=1.0)),
    of_base(_loop),
    Mistake("the last keys are missing: the loop runs to stop, the tail included", lambda *x: _loop(*x, tail=False)),
]


def _exact_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    causal: bool,
    *,
    delta: float = 1,
    scale: float | None = None,
    shift: int = 0,
    normalised: bool = True,
    dk_of_p: bool = False,
    dp_of: str = "v",
) -> tuple[Tensor, Tensor]:
    """Algorithm 2's formulas for dK and dV, with slips as options."""
    right = masked_scores(q, k, causal=causal)
    lse = right.logsumexp(-1, keepdim=True)
    rows = (right - lse).exp() @ v
    p = (masked_scores(q, k, causal=causal, shift=shift) - (lse if normalised else 0)).exp()
    dp = grad_out @ (v if dp_of == "v" else k).T
    ds = p * (dp - delta * (rows * grad_out).sum(-1, keepdim=True))
    grad_k = (p if dk_of_p else ds).T @ q * (q.shape[1] ** -0.5 if scale is None else scale)
    return grad_k, p.T @ grad_out


BACKWARD_MISTAKES = [
    *of_delta(_exact_grads),
    Mistake("the scale is forgotten: dK = dSᵀ Q · scale", lambda *x: _exact_grads(*x, scale=1.0)),
    Mistake("the scale is there twice: dK = dSᵀ Q · scale", lambda *x: _exact_grads(*x, scale=1 / x[0].shape[1])),
    Mistake(
        "there is no mask: a query before first must not see the key",
        lambda *x: _exact_grads(*x, shift=EVERY_KEY),
    ),
    Mistake("your mask is off by one: the query at first sees the key", lambda *x: _exact_grads(*x, shift=-1)),
    Mistake("your mask is off by one: the query before first does not see it", lambda *x: _exact_grads(*x, shift=1)),
    Mistake("P is not normalised: P = exp(S − lse)", lambda *x: _exact_grads(*x, normalised=False)),
    Mistake("dK is made of P: dK = dSᵀ Q · scale", lambda *x: _exact_grads(*x, dk_of_p=True)),
    Mistake("dP is made of K: dP = dO Vᵀ", lambda *x: _exact_grads(*x, dp_of="k")),
]


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
            ],
            "tail": [
                forward_case(5, 9, asks="one tile, not full"),
                forward_case(20, 43, asks="the third tile has 11 keys"),
            ],
            "causal": [
                forward_case(16, 16, causal=True, asks="key j is seen where j ≤ last"),
                forward_case(40, 43, causal=True, asks="last is a row of numbers, one a query"),
            ],
            "numbers": [
                forward_case(9, 150, rising=True, asks="each tile has a new largest score"),
                forward_case(17, 40, causal=True, times=30, asks="does it hold for large scores too?"),
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
            ],
            "tail": [backward_case(21, 9), backward_case(5, 40)],
            "causal": [
                backward_case(16, 16, causal=True, asks="query i sees the key where i ≥ first"),
                backward_case(40, 43, causal=True, asks="first is a row of numbers, one a key"),
            ],
        },
    ),
]

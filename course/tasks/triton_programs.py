"""The programs around the inner loops of unit 05: they load a tile, hand it to the loop, and store what comes back.

Kernels run in Triton's interpreter, on a machine with a GPU too: it is where `launch` can count what a loop does.
A module of its own, because it needs Triton, and the other exercises do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.runtime import prepare

os.environ["TRITON_INTERPRET"] = "1"
prepare()

import triton  # noqa: E402 - only now does @triton.jit know where the kernels run
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402

BLOCK = 16  # queries and keys in a tile


@dataclass
class Seen:
    """What Triton's interpreter did: calls of tl.dot, and numbers that were loaded."""

    dots: int = 0
    loaded: int = 0


def launch(program: str, inner_loop: Any, *inputs: Any) -> list:
    """Runs "forward" or "backward" with your loop in it, and watches.

    Returns:
        What `launch_forward` or `launch_backward` returns, then the two numbers of `Seen`.

    Raises:
        TypeError: the loop is no Triton function.
    """
    if not isinstance(inner_loop, InterpretedFunction):
        raise TypeError("this is no Triton function: keep the line @triton.jit above it")
    with watched() as seen:
        if program == "forward":
            results = [launch_forward(inner_loop, *inputs)]
        else:
            results = [*launch_backward(inner_loop, *inputs)]
    return [*results, seen.dots, seen.loaded]


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts while the block runs. A number behind a mask is not loaded."""
    seen = Seen()
    dot, load = InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load

    def create_dot(*arguments: Any) -> Any:
        seen.dots += 1
        return dot(*arguments)

    def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.loaded += int(mask.data.sum())
        return load(builder, pointers, mask, *rest)

    InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load = create_dot, create_masked_load
    try:
        yield seen
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load = dot, load


def launch_forward(inner_loop: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of one head by your `inner_loop`: a program for each tile of queries.

    Args:
        inner_loop: a @triton.jit function, see the exercise.
        q: (n_q, d), contiguous, fp32, d 16 or 32.
        k, v: (n_k, d), n_k ≥ n_q.
        causal: query i sees the keys up to i + n_k - n_q.

    Returns:
        (n_q, d).
    """
    out = torch.full_like(q, torch.nan)
    grid = (triton.cdiv(len(q), BLOCK),)
    numbers = (len(q), len(k), q.shape[1] ** -0.5)
    _launch(forward_program, grid, q, k, v, out, *numbers, CAUSAL=causal, D=q.shape[1], BLOCK=BLOCK, inner=inner_loop)
    return out


@triton.jit
def forward_program(
    q, k, v, out, n_q, n_k, scale, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, inner: tl.constexpr
):
    """A tile of queries: loads it, hands it to the inner loop, divides by l, stores."""
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = queries[:, None] * D + tl.arange(0, D)[None, :]
    q_tile = tl.load(q + places, mask=(queries < n_q)[:, None], other=0.0)
    last = queries + n_k - n_q if CAUSAL else queries * 0 + n_k - 1  # the last key that each query sees
    last = tl.minimum(last, n_k - 1)
    acc, m = tl.zeros((BLOCK, D), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    stop = tl.max(last, 0) + 1
    acc, m, l = inner(acc, m, tl.zeros((BLOCK,), tl.float32), q_tile, last, k, v, stop, n_k, scale, D, BLOCK)
    tl.store(out + places, acc / l[:, None], mask=(queries < n_q)[:, None])


def launch_backward(
    inner_loop: Any, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """dK and dV of one head by your `inner_loop`: a program for each tile of keys. lse and δ are computed here.

    Args:
        inner_loop: a @triton.jit function, see the exercise.
        q, k, v, causal: as in `launch_forward`.
        grad_out: (n_q, d).

    Returns:
        The gradients of k and v, (n_k, d) each.
    """
    scores = q @ k.T * q.shape[1] ** -0.5
    if causal:
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    delta = ((scores - lse[:, None]).exp() @ v * grad_out).sum(-1)
    grad_k, grad_v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    tensors = (q, k, v, grad_out, lse, delta, grad_k, grad_v)
    numbers = (len(q), len(k), q.shape[1] ** -0.5)
    grid = (triton.cdiv(len(k), BLOCK),)
    _launch(backward_program, grid, *tensors, *numbers, CAUSAL=causal, D=q.shape[1], BLOCK=BLOCK, inner=inner_loop)
    return grad_k, grad_v


@triton.jit
def backward_program(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, n_q, n_k, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    """A tile of keys: loads it, hands it to the inner loop over the queries, stores dK and dV."""
    start = tl.program_id(0) * BLOCK
    keys = start + tl.arange(0, BLOCK)
    places = keys[:, None] * D + tl.arange(0, D)[None, :]
    inside = (keys < n_k)[:, None]
    k_tile, v_tile = tl.load(k + places, mask=inside, other=0.0), tl.load(v + places, mask=inside, other=0.0)
    first = keys - (n_k - n_q) if CAUSAL else keys * 0  # the first query that sees each key
    begin = tl.maximum(0, tl.min(first, 0)) // BLOCK * BLOCK
    dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    dk, dv = inner(dk, dv, k_tile, v_tile, first, q, grad_out, lse, delta, begin, n_q, scale, D, BLOCK)
    tl.store(grad_k + places, dk, mask=inside)
    tl.store(grad_v + places, dv, mask=inside)


def _launch(kernel: Any, grid: tuple[int], *tensors: Any, **constants: Any) -> None:
    try:
        kernel[grid](*tensors, **constants)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the interpreter wraps an error once for each function it leaves
            cause = cause.__cause__
        raise cause from None

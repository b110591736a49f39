"""The programs around the inner loops of unit 05: they load a tile, hand it to the loop, and store what comes back.

Kernels run in Triton's interpreter, on a machine with a GPU too: it is where `launch` can count what a loop does.
A module of its own, because it needs Triton, and the other exercises do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.runtime import prepare

os.environ["TRITON_INTERPRET"] = "1"
prepare()

import triton  # noqa: E402 - only now does @triton.jit know where the kernels run
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder  # noqa: E402

GUARD = 64 * 64  # numbers of NaN behind each tensor, four of the largest tiles


SAID_BETTER = {
    "reduction dimensions": "tl.dot takes (M, K) and (K, N). Is a tl.trans missing, or is a tile not (BLOCK, D)?",
    "values to unpack": "return what the program takes from `inner`",
    "cannot unpack": "return what the program takes from `inner`",
}


class Memory(NamedTuple):
    """Where a tensor lies: from the address `begin` up to `end`."""

    name: str
    begin: int
    end: int
    rows: int
    number_bytes: int


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
        IndexError: it reads what no tensor has.
    """
    if not isinstance(inner_loop, InterpretedFunction):
        raise TypeError("this is no Triton function: keep the line @triton.jit above it")
    launched: Any = {"forward": launch_forward, "backward": launch_backward}[program]
    with watched() as seen:
        results = launched(inner_loop, *inputs)
    return [*results, seen.dots, seen.loaded]


@contextmanager
def watched() -> Iterator[Seen]:
    """Counts while the block runs. A number behind a mask is not loaded, and without `other` it is NaN."""
    seen = Seen()
    dot, load = InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load

    def create_dot(*arguments: Any, **named: Any) -> Any:
        seen.dots += 1
        return dot(*arguments, **named)

    def create_masked_load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        wanted = _wanted(mask)
        seen.loaded += int(wanted.sum())
        result = load(builder, pointers, mask, other, *rest, **named)
        if other is None and result.data.dtype.kind == "f":
            result.data = np.where(wanted, result.data, np.array(np.nan, result.data.dtype))  # undefined on a GPU
        return result

    InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load = create_dot, create_masked_load
    try:
        yield seen
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.create_masked_load = dot, load


@contextmanager
def guarded(**tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of the tensors, with NaN behind them; while the block runs, a load from anywhere else is an error."""
    copies = [_with_guard(x) for x in tensors.values()]
    memory = [
        Memory(name, x.data_ptr(), x.data_ptr() + x.nbytes, len(x), x.element_size())
        for name, x in zip(tensors, copies, strict=True)
    ]
    load = InterpreterBuilder.create_masked_load

    def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        wanted = _wanted(mask)
        _refuse_strangers(np.broadcast_to(pointers.data, wanted.shape)[wanted], memory)
        return load(builder, pointers, mask, *rest, **named)

    InterpreterBuilder.create_masked_load = create_masked_load
    try:
        yield copies
    finally:
        InterpreterBuilder.create_masked_load = load


def _wanted(mask: Any) -> np.ndarray:
    """Which numbers a load asks for; a block pointer's mask is an array already."""
    return np.asarray(mask if isinstance(mask, np.ndarray) else mask.data)


def _with_guard(x: Tensor) -> Tensor:
    buffer = x.new_full((x.numel() + GUARD,), torch.nan)
    return buffer[: x.numel()].copy_(x.flatten()).view(x.shape)


def _refuse_strangers(addresses: np.ndarray, memory: list[Memory]) -> None:
    """Raises IndexError for the first address that is in none of the tensors."""
    strange = np.ones(addresses.shape, dtype=bool)
    for one in memory:
        strange &= (addresses < one.begin) | (addresses >= one.end)
    if not strange.any():
        return
    address = int(addresses[strange][0])
    before = [one for one in memory if one.begin <= address < one.end + GUARD * one.number_bytes]
    if not before:
        raise IndexError("tl.load reads where no tensor is: look at the offsets")
    name, begin, end, rows, _ = before[0]
    raise IndexError(
        f"tl.load reads behind the end of {name}: row {(address - begin) * rows // (end - begin)}, where the last one "
        f"is {rows - 1}. Look at the mask and at the offsets"
    )


def launch_forward(
    inner_loop: Any, q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, block: int
) -> list[Tensor]:
    """Attention of one head in a sliding window by your `inner_loop`: a program for each tile of queries.

    Args:
        inner_loop: a @triton.jit function, see the exercise.
        q: (n_q, d), contiguous, fp32, d 16, 32 or 64.
        k, v: (n_k, d).
        left, right: keys that a query sees before and behind its position, -1 for no limit; the last query has the
            last key's position, and right = 0 is causal.
        scale: of the scores.
        block: queries and keys in a tile, 16 or 32.

    Returns:
        out, (n_q, d).
    """
    out = torch.full_like(q, torch.nan)
    grid = (triton.cdiv(len(q), block),)
    numbers = (len(q), len(k), left, right, scale)
    with guarded(q=q, k=k, v=v) as tensors:
        _launch(forward_program, grid, *tensors, out, *numbers, D=q.shape[1], BLOCK=block, inner=inner_loop)
    return [out]


@triton.jit
def forward_program(
    q, k, v, out, n_q, n_k, left, right, scale, D: tl.constexpr, BLOCK: tl.constexpr, inner: tl.constexpr
):
    """A tile of queries: loads it, hands it to the inner loop, divides by l, stores."""
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = queries[:, None] * D + tl.arange(0, D)[None, :]
    q_tile = tl.load(q + places, mask=(queries < n_q)[:, None], other=0.0)
    positions = queries + n_k - n_q  # the last query has the last key's position
    first = tl.where(left < 0, 0, tl.maximum(positions - left, 0))  # the keys that each query sees: first … last
    last = tl.where(right < 0, n_k - 1, tl.minimum(positions + right, n_k - 1))
    begin = tl.min(first, 0) // BLOCK * BLOCK
    stop = tl.max(last, 0) + 1
    acc, m = tl.zeros((BLOCK, D), tl.float32), tl.full((BLOCK,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    acc, m, l = inner(acc, m, l, q_tile, first, last, k, v, begin, stop, n_k, scale, D, BLOCK)
    acc = acc / tl.where(l == 0, 1, l)[:, None]  # a query that sees no key: 0
    tl.store(out + places, acc, mask=(queries < n_q)[:, None])


def launch_backward(
    inner_loop: Any, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, causal: bool, scale: float, block: int
) -> list[Tensor]:
    """dK and dV of one head by your `inner_loop`: a program for each tile of keys. lse and δ are computed here.

    Args:
        inner_loop: a @triton.jit function, see the exercise.
        q, k, v, scale, block: as in `launch_forward`; n_k ≥ n_q where it is causal.
        grad_out: (n_q, d).
        causal: query i sees the keys up to i + n_k - n_q.

    Returns:
        The gradients of k and v, (n_k, d) each.
    """
    scores = q @ k.T * scale
    if causal:
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    delta = ((scores - lse[:, None]).exp() @ v * grad_out).sum(-1)
    grad_k, grad_v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    numbers = (len(q), len(k), scale)
    grid, constants = (triton.cdiv(len(k), block),), dict(CAUSAL=causal, D=q.shape[1], BLOCK=block, inner=inner_loop)
    with guarded(q=q, k=k, v=v, grad_out=grad_out, lse=lse, delta=delta) as tensors:
        _launch(backward_program, grid, *tensors, grad_k, grad_v, *numbers, **constants)
    return [grad_k, grad_v]


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
        for part, more in SAID_BETTER.items():
            if part in str(cause):
                cause = ValueError(f"{cause}: {more}").with_traceback(cause.__traceback__)
        raise cause from None

"""Lesson 05's small kernels, which it asks for first: `row_softmax`, and `looped` with its `update`.

A module of its own, imported when it is needed: it needs Triton, and the other lessons do not.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.runtime import prepare
from kernels.tiles import load_tile

DEVICE = "cuda" if prepare().name == "gpu" else "cpu"
BEHIND = 32  # rows of NaN behind a tensor, the largest tile


@triton.jit
def row_softmax(x, out, stride, n, BLOCK: tl.constexpr):
    """The softmax of a row of n numbers; row i begins i · stride numbers after the pointer."""
    columns = tl.arange(0, BLOCK)
    places = tl.program_id(0) * stride + columns
    scores = tl.load(x + places, mask=columns < n, other=float("-inf"))  # exp(−∞) is 0: the rest counts nothing
    p = tl.exp(scores - tl.max(scores, 0))
    tl.store(out + places, p / tl.sum(p, 0), mask=columns < n)


@triton.jit
def update(acc, m, l, scores, v_tile):
    """Lesson 02's online softmax, one tile further: acc, m and l."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp(scores - m_new[:, None])
    rescale = tl.exp(m - m_new)
    acc = acc * rescale[:, None] + tl.dot(p, v_tile, input_precision="ieee")
    return acc, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def looped(q, k, v, out, stride, scale, n, B: tl.constexpr, D: tl.constexpr):
    """Attention of B queries to n keys, a tile of B keys at a time."""
    start = tl.program_id(0) * B
    q_tile = load_tile(q + start * stride, stride, n - start, B, D, D, WHOLE=False)
    m, l = tl.full((B,), float("-inf"), tl.float32), tl.zeros((B,), tl.float32)
    acc = tl.zeros((B, D), tl.float32)
    for j in range(0, n, B):
        k_tile = load_tile(k + j * stride, stride, n - j, B, D, D, WHOLE=False)
        v_tile = load_tile(v + j * stride, stride, n - j, B, D, D, WHOLE=False)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        inside = j + tl.arange(0, B) < n  # keys behind the end: −∞, not 0
        scores = tl.where(inside[None, :], scores, float("-inf"))
        acc, m, l = update(acc, m, l, scores, v_tile)
    rows = start + tl.arange(0, B)[:, None]
    tl.store(out + rows * stride + tl.arange(0, D)[None, :], acc / l[:, None], mask=rows < n)


def run_row_softmax(kernel: Any, x: Tensor, block: int) -> Tensor:
    """The softmax of each row of x (rows, n) by a kernel like `row_softmax`. Rows lie n + block apart, NaN between."""
    rows, n = x.shape
    given, out = _apart(x, n + block), _apart(torch.full_like(x, torch.nan), n + block, torch.inf)
    _launch(kernel, (rows,), given, out, n + block, n, BLOCK=block)
    return _read(out, rows, n)


def run_looped(kernel: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, block: int) -> Tensor:
    """Attention of one head by a kernel like `looped`: q, k, v (n, d), one head of two, and NaN in the other."""
    n, d = q.shape
    given, out = [_apart(x, 2 * d) for x in (q, k, v)], _apart(torch.full_like(q, torch.nan), 2 * d, torch.inf)
    _launch(kernel, (triton.cdiv(n, block),), *given, out, 2 * d, scale, n, B=block, D=d)
    return _read(out, n, d)


def _apart(x: Tensor, stride: int, between: float = torch.nan) -> Tensor:
    """The rows of x a stride apart, with this number between and behind them."""
    buffer = x.new_full((len(x) + BEHIND, stride), between)
    buffer[: len(x), : x.shape[1]] = x
    return buffer.to(DEVICE)


def _read(buffer: Tensor, rows: int, n: int) -> Tensor:
    buffer = buffer.cpu()
    if not (buffer[rows:].isposinf().all() and buffer[:, n:].isposinf().all()):
        raise IndexError("tl.store writes outside of the rows: begin where `stride` says, and store under a mask")
    return buffer[:rows, :n].contiguous()


def _launch(kernel: Any, grid: tuple[int], *arguments: Any, **constants: int) -> None:
    kernel = getattr(kernel, "kernel", kernel)
    if not hasattr(kernel, "fn"):
        raise TypeError("this is no Triton function: keep the line @triton.jit above it")
    if re.search(
        r"^ *raise NotImplementedError", inspect.getsource(kernel.fn), re.MULTILINE
    ):  # on a GPU it would be an error of the compiler
        raise NotImplementedError
    try:
        kernel[grid](*arguments, **constants)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the interpreter wraps an error once for each function it leaves
            cause = cause.__cause__
        raise cause from None

"""Attention by a rung of the ladder: on a Hopper GPU, or for CPU tensors in the emulator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.descriptors import Checked
from kernels.emulator import emulate
from kernels.hopper import rung1_tma_wgmma, rung2_pipelined, rung3_specialized

RUNGS: dict[str, ModuleType] = {
    "tma_wgmma": rung1_tma_wgmma,
    "pipelined": rung2_pipelined,
    "specialized": rung3_specialized,
}
BLOCK_M = BLOCK_N = 128
STAGES = 2
HEADDIMS = (64, 128)
MAX_GRID = 65535  # programs along the second and third axis of a launch (CUDA)
GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rung: str = "specialized",
    causal: bool = False,
    softmax_scale: float | None = None,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
    explore: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The forward pass of attention by one rung's kernel.

    Args:
        q: (batch, seqlen_q, nheads, headdim), bf16 or fp16, headdim 64 or 128.
        k, v: (batch, seqlen_k, nheads_k, headdim), of the same type; nheads a multiple of nheads_k.
        rung: one of RUNGS.
        causal: query i sees the keys up to i + seqlen_k - seqlen_q (bottom-right aligned).
        softmax_scale: factor of the scores, positive; 1/√headdim when left out.
        block_m: rows of a tile of queries, 64 (one warpgroup) or 128 (two).
        block_n: rows of a tile of keys, a power of two from 16 to 256, or to 128 where headdim is 128.
        explore, seed: on the CPU, how many other interleavings to run too, and their seed.

    Returns:
        out like q, and lse (batch, nheads, seqlen_q) in natural log, fp32. A row that sees no key: 0 and -inf.

    Raises:
        ValueError: where the rung is unknown, or an argument is not as above.
        kernels.emulator.Report: on the CPU, where the emulator finds a fault in the kernel.
    """
    _check(q, k, v, rung, softmax_scale, block_m, block_n)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    launch = launch_of(q, k, v, out, lse, causal, softmax_scale, block_m, block_n)
    kernel = RUNGS[rung].forward
    if q.is_cuda:
        with torch.cuda.device_of(q):  # Triton launches on the current device, which may not be that of the tensors
            kernel[launch.grid](*launch.arguments, num_warps=launch.num_warps)
    else:
        emulate(kernel, launch.grid, *launch.arguments, num_warps=launch.num_warps, explore=explore, seed=seed)
    return out, lse


@dataclass(frozen=True)
class Launch:
    """A kernel's grid, its arguments in order, and the warps that compute."""

    grid: tuple[int, int, int]
    arguments: list[Any]
    num_warps: int


def launch_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    softmax_scale: float | None = None,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
) -> Launch:
    """The launch that all rungs share: a program per tile of queries, head and sequence, with a warp for 16 rows."""
    scale = 1 / math.sqrt(q.shape[3]) if softmax_scale is None else softmax_scale
    arguments: list[Any] = [_described(q, block_m), _described(k, block_n), _described(v, block_n)]
    arguments += [_described(out, block_m), lse, q.shape[1], k.shape[1], q.shape[2] // k.shape[2]]
    arguments += [scale * math.log2(math.e), causal, STAGES]
    return Launch((-(-q.shape[1] // block_m), q.shape[2], q.shape[0]), arguments, block_m // 16)


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """(batch, seqlen, heads · headdim) in blocks of (1, rows, headdim): a head is a block of columns.

    The sequence has a dimension of its own, so that rows past its end load as zeros and not as the next sequence's.
    """
    batch, seqlen, nheads, headdim = x.shape
    flat = x.reshape(batch, seqlen, nheads * headdim)
    of_batch, of_row, step = flat.stride()  # 8 numbers are 16 bytes
    if step != 1 or of_batch % 8 or of_row % 8 or not of_batch or not of_row or flat.data_ptr() % 16:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return _checked(flat, rows, headdim)


def _descriptor(flat: Tensor, rows: int, headdim: int) -> TensorDescriptor:
    block = [1, rows, headdim]
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[flat.dtype])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), block, layout)


_checked = Checked(_descriptor)


def _check(q: Tensor, k: Tensor, v: Tensor, rung: str, softmax_scale: float | None, block_m: int, block_n: int) -> None:
    if rung not in RUNGS:
        raise ValueError(f"rung is {rung!r}, wants one of {', '.join(RUNGS)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[3] not in HEADDIMS:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, wants (batch, seqlen, nheads, 64 or 128)")
        if x.dtype not in GLUON_TYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, wants bf16 or fp16, the same for q, k and v")
    if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit each other")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"key has {k.shape[2]} heads, not a divisor of query's {q.shape[2]}")
    if max(q.shape[0], q.shape[2]) > MAX_GRID:
        raise ValueError(f"q has batch {q.shape[0]} and {q.shape[2]} heads, and a launch takes {MAX_GRID} of each")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}, wants a positive number")
    if block_m not in (64, 128):
        raise ValueError(f"block_m is {block_m}, wants 64 or 128")
    largest = 16384 // q.shape[3]  # rings of two slots for K and for V do not fit into shared memory with more
    if block_n not in (16, 32, 64, 128, 256) or block_n > largest:
        raise ValueError(f"block_n is {block_n}, wants a power of two from 16 to {largest}")
    if q.is_cuda and torch.cuda.get_device_capability(q.device) != (9, 0):
        raise ValueError(f"q is on {torch.cuda.get_device_name(q.device)}, and these kernels are for Hopper, sm_90")

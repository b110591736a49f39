"""Tensor descriptors: which calls load their tiles by them, and descriptors of tensors.

From sm_90 on the tensor memory accelerator (TMA) copies a tile by one instruction of one thread: no addresses in
registers, and a barrier for each tile, so that the copy of V also overlaps the softmax. What it cannot do (an address
or a stride that is not a multiple of 16 bytes) is loaded by pointers, and so is everything on other GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tuning
from kernels.descriptors import Checked
from kernels.runtime import prepare
from kernels.targets import TARGETS

MODE = prepare()
BYTES = 16  # addresses and strides are multiples of it
MAX_STRIDE = 2**40  # bytes
MAX_ROWS = 2**31 - 1  # an index is a signed number of 32 bits
_in_use: list[bool] = []  # inside `using_descriptors`


def why_pointers(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the forward of a call takes pointers, or "" where it takes descriptors.

    Args:
        q, k, v: as in `flash_attention`, padded or ragged.

    Example:
        >>> q = k = v = torch.zeros(1, 20, 4, 59, dtype=torch.float16)  # 59 numbers are 118 bytes
        >>> with using_descriptors():
        ...     why_pointers(q, k, v)
        'q has a stride of 472 bytes, and a descriptor takes multiples of 16'
    """
    reason = why_not_here(q.dtype, q.shape[-1])
    if reason:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % BYTES:
            return f"{name} begins at an address that {BYTES} does not divide"
        reason = _why_not(x.shape, x.stride(), x.dtype.itemsize)
        if reason:
            return f"{name} has a {reason}"
    return ""


def why_not_here(dtype: torch.dtype, headdim: int) -> str:
    """Why this machine takes pointers, whatever the tensors' strides, or "" where it takes descriptors."""
    if _in_use:
        return "" if _in_use[-1] else "descriptors are switched off"
    if MODE.name != "gpu":
        return "the interpreter takes pointers unless `using_descriptors` asks for descriptors"
    return why_not_on(tuning.this_gpu(), dtype, headdim)


@lru_cache(maxsize=1024)
def why_not_on(target: str, dtype: torch.dtype, headdim: int) -> str:
    """Why a GPU takes pointers, whatever the tensors' strides, or "" where it takes descriptors.

    Args:
        target: one of `kernels.targets`.
        dtype, headdim: of the tensors.

    Example:
        >>> why_not_on("sm_80", torch.bfloat16, 128)
        'sm_80 has no tensor memory accelerator'
    """
    if TARGETS[target].capability < (9, 0):
        return f"{target} has no tensor memory accelerator"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype} is multiplied without tensor cores, in tiles too small for descriptors"
    if not tuning.candidates("forward", headdim, dtype, target, tma=True):
        return f"{target} has no tile for headdim {headdim} with descriptors that spills nothing"
    return ""


@lru_cache(maxsize=4096)
def _why_not(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> str:
    for length, stride in zip(shape[:-1], strides, strict=False):
        step = stride * itemsize
        if step % BYTES and length > 1:
            return f"stride of {step} bytes, and a descriptor takes multiples of {BYTES}"
        if length > 1 and not 0 < step < MAX_STRIDE:
            return f"stride of {step} bytes, and a descriptor takes 1 to 2⁴⁰"
        if not 0 < length <= MAX_ROWS:
            return f"dimension of {length}, and a descriptor takes 1 to 2³¹ - 1"
    return ""


@contextmanager
def using_descriptors(on: bool = True) -> Iterator[None]:
    """Inside the `with` block every call takes descriptors where its tensors allow it, or none does: for tests."""
    _in_use.append(on)
    try:
        yield
    finally:
        _in_use.pop()


def describe(x: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of (batch, nheads, seqlen, headdim), batch 1 for a ragged x, in blocks of `rows` of one head.

    headdim is a dimension of its own, so that a block wider than it is filled up with 0 and not with the next head.
    `why_pointers` has checked the address.
    """
    return _checked(x, rows, block_d)


def _descriptor(x: Tensor, rows: int, block_d: int) -> TensorDescriptor:
    batch, seqlen, nheads, headdim = x.shape if x.ndim == 4 else (1, *x.shape)
    of_batch, of_row, of_head = x.stride()[:-1] if x.ndim == 4 else (0, *x.stride()[:-1])
    unused = BYTES // x.dtype.itemsize  # the stride of a dimension of 1 may be anything, a descriptor's may not
    strides = [of_batch if batch > 1 else unused, of_head if nheads > 1 else unused, of_row if seqlen > 1 else unused]
    return TensorDescriptor(x, [batch, nheads, seqlen, headdim], [*strides, 1], [1, 1, rows, block_d])


def candidates_here(kernel: str, headdim: int, dtype: torch.dtype) -> list[tuning.Config]:
    """`tuning.candidates` of this GPU for a padded call with contiguous tensors and no window."""
    tma = kernel == "forward" and not why_not_here(dtype, headdim)
    return tuning.candidates(kernel, headdim, dtype, tuning.this_gpu(), tma=tma)


_checked = Checked(_descriptor)

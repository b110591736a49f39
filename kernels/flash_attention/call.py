"""One call: the arguments that its kernels share, and a launch for each kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels import tuning
from kernels.flash_attention.backward import backward_kv_kernel, backward_q_kernel, delta_kernel
from kernels.flash_attention.descriptors import describe, why_pointers
from kernels.flash_attention.forward import forward_kernel
from kernels.runtime import prepare

MODE = prepare()
DELTA_ROWS = 256 if MODE.name == "interpreter" else 32  # a program of delta_kernel


class Call:
    """The arguments that the kernels of one call share, and the launches: a program per tile, head and sequence."""

    def __init__(self, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap):
        self.ragged = cu_seqlens_q is not None
        if self.ragged:  # the kernel reads consecutive entries
            cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        shape = q.shape
        self.batch = len(cu_seqlens_q) - 1 if self.ragged else shape[0]
        self.nheads, self.nheads_k = shape[-2], k.shape[-2]
        self.seqlen_q, self.seqlen_k = max_seqlen_q, max_seqlen_k
        self.lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.scoring = (scale, softcap, left, right)
        self.constants = constants(shape[-1], self.nheads // self.nheads_k, left >= 0, right >= 0, softcap > 0)
        length = tuning.length_class(max_seqlen_q, max_seqlen_k)
        self.kind = tuning.Kind(shape[-1], q.dtype, right >= 0, left >= 0, self.ragged, length)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Launches the forward, which fills out and lse."""
        tma = not why_pointers(q, k, v)
        config = tuning.choice("forward", self.kind._replace(tma=True) if tma else self.kind)
        grid = (-(-self.seqlen_q // config.block_q), self.nheads, self.batch)
        inputs: tuple[Any, ...] = (q, k, v)
        strides: tuple[Any, ...] = (None, None, None)
        if tma:
            block_d, rows = self.constants["BLOCK_D"], config.block_k
            inputs = (describe(q, config.block_q, block_d), describe(k, rows, block_d), describe(v, rows, block_d))
        else:
            strides = (self._strides(q), self._strides(k), self._strides(v))
        forward_kernel[grid](
            *inputs, out, lse, *strides, self._strides(out), *self._row_strides(lse), *self.lengths, *self.scoring,
            **self.constants, **config.keywords(), TMA=tma,
        )  # fmt: skip

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, grad_q, grad_k, grad_v) -> None:
        """Launches δ, then dK and dV, then dQ, which fill the three gradients."""
        delta = torch.empty_like(lse)
        self._delta(out, grad_out, grad_lse, delta)
        tensors = (q, k, v, grad_out, lse, delta)
        strides = (*map(self._strides, (q, k, v, grad_out)), *self._row_strides(lse))

        sizes = tuning.choice("backward_kv", self.kind).keywords()
        grid = (-(-self.seqlen_k // sizes["BLOCK_K"]), self.nheads_k, self.batch)
        kv = (grad_k, grad_v, self._strides(grad_k))  # both are contiguous
        backward_kv_kernel[grid](*tensors, *strides, *kv, *self.lengths, *self.scoring, **self.constants, **sizes)

        sizes = tuning.choice("backward_q", self.kind).keywords()
        grid = (-(-self.seqlen_q // sizes["BLOCK_Q"]), self.nheads, self.batch)
        outputs = (grad_q, self._strides(grad_q))
        backward_q_kernel[grid](*tensors, *strides, *outputs, *self.lengths, *self.scoring, **self.constants, **sizes)

    def _delta(self, out: Tensor, grad_out: Tensor, grad_lse: Tensor, delta: Tensor) -> None:
        grid = (-(-self.seqlen_q // DELTA_ROWS), self.nheads, self.batch)
        strides = (*map(self._strides, (out, grad_out)), *self._row_strides(delta))
        sizes = {name: self.constants[name] for name in ("HEADDIM", "BLOCK_D")}
        delta_kernel[grid](
            out, grad_out, grad_lse, delta, *strides, self.lengths[0], self.seqlen_q, BLOCK_Q=DELTA_ROWS, **sizes
        )

    def _strides(self, x: Tensor) -> tuple[int, int, int]:
        """(batch, row, head), in elements; 0 for the batch where cu_seqlens locates the sequences."""
        strides = x.stride()
        return (0 if self.ragged else strides[0], strides[-3], strides[-2])

    def _row_strides(self, x: Tensor) -> tuple[int, int]:
        """(batch, head) of lse or delta, which are (batch, nheads, seqlen) or (nheads, total)."""
        return (0 if self.ragged else x.stride(0), x.stride(-2))


@lru_cache(maxsize=1024)
def constants(headdim: int, group: int, left: bool, right: bool, softcap: bool) -> dict:
    """What a kernel is compiled for. A flag that is False leaves its branch out of the compiled kernel."""
    block_d = tuning.padded(headdim)
    return dict(GROUP=group, HEADDIM=headdim, BLOCK_D=block_d, LEFT=left, RIGHT=right, SOFTCAP=softcap)

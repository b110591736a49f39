"""The course's FlashAttention-2 kernel, as a back end: on the GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.derivatives import has_tangent, in_torch_func
from kernels.runtime import prepare
from minillm.attention.keys import Keys, Options, as_ragged


def why_not(q: Tensor, keys: Keys, options: Options) -> str | None:
    """What it cannot do of a call, None where it can."""
    mode = prepare()
    if mode.name == "none":
        return f"cannot run: {mode.reason}"
    if q.is_cuda != (mode.name == "gpu"):
        return f"runs in the {mode.name} here ({mode.reason}), and q is on {q.device}"
    if q.dtype == torch.float64 and mode.name == "gpu":
        return "has no float64"
    if q.shape[-1] > 256:
        return f"has no headdim over 256, and q has {q.shape[-1]}"
    if options.softmax_scale is not None and options.softmax_scale <= 0:
        return f"wants a positive softmax_scale, and it is {options.softmax_scale}"
    if max(keys.batch, q.shape[-2]) > 65535:  # programs along an axis of a launch
        return f"has no batch or heads over 65535, and q has {keys.batch} and {q.shape[-2]}"
    if has_tangent(q, keys.k, keys.v) or in_torch_func(q, keys.k, keys.v):
        return "has one backward only, and no forward-mode derivative or torch.func"
    return "has no block_q and block_k" if options.block_sizes else None


def slow(q: Tensor, keys: Keys, options: Options) -> str | None:
    """Why it would be slow on this machine, None where it is not."""
    mode = prepare()
    return None if mode.name == "gpu" else f"would run in the interpreter, slowly: {mode.reason}"


def run(q: Tensor, keys: Keys, options: Options) -> Any:
    """One launch for all sequences; keys that are neither dense nor ragged are copied into a ragged batch first."""
    from kernels.flash_attention import Ragged, flash_attention  # on import, it decides where its kernels run

    arguments = options.arguments
    return_lse = arguments.pop("return_lse")
    if keys.dense and options.cu_seqlens_q is None:
        out, lse = flash_attention(q, keys.k, keys.v, **arguments)
    else:
        rows, k, v, bounds = as_ragged(q, keys, options)
        out, lse = flash_attention(rows, k, v, Ragged(*bounds), **arguments)
        if options.cu_seqlens_q is None:
            out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return (out, lse) if return_lse else out

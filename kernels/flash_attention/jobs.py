"""The Triton kernels as jobs for `kernels.compiling`: what a call launches on each kind of GPU."""

from __future__ import annotations

import torch

from kernels import tuning
from kernels.compiling.job import Job
from kernels.flash_attention.call import constants
from kernels.flash_attention.descriptors import why_not_on

MODULES = {"forward": "forward", "backward_kv": "backward", "backward_q": "backward"}  # where each kernel is
HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def flash_attention_jobs(
    target: str,
    *,
    headdims: tuple[int, ...] = (64, 128, 256),
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    window: bool = False,
    softcap: bool = False,
    group: int = 1,
    ragged: bool = False,
    every: bool = False,
    pointers: bool = False,
) -> dict[str, Job]:
    """Forward and backward, as a call with contiguous tensors compiles them: {name: job}.

    Args:
        target: one of `kernels.targets`.
        headdims, dtype, causal, window, softcap: of the call.
        group: query heads that share a KV head.
        ragged: a ragged batch, with cu_seqlens.
        every: all candidates of `kernels.tuning` instead of the first choice.
        pointers: also where the forward would take tensor descriptors, which its name says by "tma".
    """
    jobs = {}
    for kernel in tuning.KERNELS:
        for headdim in headdims:
            tma = kernel == "forward" and not pointers and not why_not_on(target, dtype, headdim)
            configs = tuning.candidates(kernel, headdim, dtype, target, window, ragged=ragged, tma=tma)
            for config in configs if every else configs[:1]:
                sizes = config.keywords()
                warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
                values = constants(headdim, group, window, causal or window, softcap) | sizes
                name = f"{kernel} d={headdim} " + "{}×{} {}w {}s".format(*config) + " tma" * tma
                signature = _signature(kernel, HALVES.get(dtype, "fp32"), ragged)
                if kernel == "forward":
                    values["TMA"] = tma
                if tma:
                    signature |= _descriptors(HALVES[dtype], config, values["BLOCK_D"])
                where = f"kernels.flash_attention.{MODULES[kernel]}:{kernel}_kernel"
                jobs[name] = Job(where, signature, values, target, warps, stages)
    return jobs


def _signature(kernel: str, dtype: str, ragged: bool = False) -> dict:
    """Types of the arguments. Tensors are contiguous, so addresses and strides are divisible by 16."""
    tensor, row, strides = f"*{dtype}:16", "*fp32:16", ["i32:16"] * 3
    row_strides = {"row_batch": "i32", "row_head": "i32"}
    cu_seqlens = "*i32:16" if ragged else "None"
    lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "seqlen_q": "i32", "seqlen_k": "i32"}
    mask = {"scale": "fp32", "softcap": "fp32", "left": "i32", "right": "i32"}
    if kernel == "forward":
        tensors = dict.fromkeys(("q", "k", "v", "out"), tensor) | {"lse": row}
        steps = {f"{name}_strides": strides for name in ("q", "k", "v", "out")} | row_strides
        return tensors | steps | lengths | mask
    tensors = dict.fromkeys(("q", "k", "v", "grad_out"), tensor) | {"lse": row, "delta": row}
    steps = {f"{name}_strides": strides for name in ("q", "k", "v", "grad_out")} | row_strides
    outputs = ("grad_k", "grad_v") if kernel == "backward_kv" else ("grad_q",)
    return tensors | steps | dict.fromkeys(outputs, tensor) | {"grad_strides": strides} | lengths | mask


def _descriptors(dtype: str, config: tuning.Config, block_d: int) -> dict:
    """Types of the arguments that differ where q, k and v are descriptors."""
    rows = {"q": config.block_q, "k": config.block_k, "v": config.block_k}
    blocks = {name: f"tensordesc<{dtype}[1, 1, {rows[name]}, {block_d}]>" for name in rows}
    return blocks | {f"{name}_strides": "None" for name in rows}


def hard_jobs(target: str) -> dict[str, Job]:
    """Kinds of calls that need more registers: GQA, ragged batches, padded dimensions, windows, soft caps."""
    calls: dict[str, dict] = {
        "GQA": dict(group=4),
        "GQA ragged": dict(group=4, ragged=True, headdims=(64, 96, 128, 256)),
        "ragged": dict(ragged=True),
        "window": dict(causal=False, window=True, headdims=(64, 96, 128, 256)),
        "softcap": dict(softcap=True, headdims=(128,)),
        "fp16 full": dict(causal=False, dtype=torch.float16),
        "pointers": dict(pointers=True),
    }
    found = {call: flash_attention_jobs(target, **options) for call, options in calls.items()}
    return {f"{name} {call}": job for call, jobs in found.items() for name, job in jobs.items()}

"""`make compile-matrix`: every kernel in the configuration that each kind of GPU gets, compiled without a GPU.

    python -m kernels.matrix [sm_90 …]

A new kernel joins with a function (target) -> {name: Job} in `KERNELS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from kernels import tuning
from kernels.hopper.compiled import rung_jobs
from kernels.inspection import Job, Report, inspect
from kernels.targets import TARGETS

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def flash_attention(
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
) -> dict[str, Job]:
    """Forward and backward, as a call with contiguous tensors compiles them.

    Args:
        target: one of `kernels.targets`.
        headdims, dtype, causal, window, softcap: of the call.
        group: query heads that share a KV head.
        ragged: sequences one behind the other, found by cu_seqlens.
        every: all candidates of `kernels.tuning` instead of the first choice.
    """
    jobs = {}
    for kernel in tuning.KERNELS:
        for headdim in headdims:
            configs = tuning.candidates(kernel, headdim, dtype, target, window)
            for config in configs if every else configs[:1]:
                sizes = config.keywords()
                warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
                flags = dict(LEFT=window, RIGHT=causal or window, SOFTCAP=softcap)
                constants = dict(GROUP=group, HEADDIM=headdim, BLOCK_D=tuning.padded(headdim), **flags, **sizes)
                name = f"{kernel} d={headdim} " + "{}×{} {}w {}s".format(*config)
                signature = flash_attention_signature(kernel, HALVES.get(dtype, "fp32"), ragged)
                where = f"kernels.flash_attention:{kernel}_kernel"
                jobs[name] = Job(where, signature, constants, target, warps, stages)
    return jobs


def flash_attention_signature(kernel: str, dtype: str, ragged: bool = False) -> dict:
    """Types of the arguments: contiguous tensors, so that addresses and strides are divisible by 16."""
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


def hopper(target: str) -> dict[str, Job]:
    """The rungs of `kernels.hopper`, which compile for Hopper alone."""
    jobs = rung_jobs() if target == "sm_90" else {}
    return {f"{rung} d={headdim}": job for (rung, headdim), job in jobs.items()}


def flash_attention_hard(target: str) -> dict[str, Job]:
    """Calls that need more registers: GQA, ragged batches, padded dimensions, windows, soft caps."""
    calls: dict[str, dict] = {
        "GQA": dict(group=4),
        "GQA ragged": dict(group=4, ragged=True, headdims=(64, 96, 128, 256)),
        "ragged": dict(ragged=True),
        "window": dict(causal=False, window=True, headdims=(64, 96, 128, 256)),
        "softcap": dict(softcap=True, headdims=(128,)),
        "fp16 full": dict(causal=False, dtype=torch.float16),
    }
    found = {call: flash_attention(target, **options) for call, options in calls.items()}
    return {f"{name} {call}": job for call, jobs in found.items() for name, job in jobs.items()}


KERNELS: dict[str, Callable[[str], dict[str, Job]]] = {
    "flash_attention": flash_attention,
    "flash_attention*": flash_attention_hard,
    "hopper": hopper,
}


def main() -> None:
    targets = sys.argv[1:] or list(TARGETS)
    print(
        "sm_75 (T4) and older: not supported, no tensor-core instruction for our tiles; PyTorch's attention runs there"
    )
    for target in targets:
        for family, jobs_for in KERNELS.items():
            jobs = jobs_for(target)
            for (name, job), report in zip(jobs.items(), inspect(jobs.values()), strict=True):
                print(f"{target:7} {family:16} {name:42} {line(job, report)}", flush=True)


def line(job: Job, report: Report) -> str:
    """A report in one line."""
    if report.failure:
        return report.failure
    instructions = ", ".join(f"{count} {kind}" for kind, count in report.instructions.items()) or "no tensor core"
    spilled = f", {report.spilled_bytes} B spilled" if report.spilled_bytes else ""
    return (
        f"{instructions:14} {report.async_copies:3} async copies  {report.registers:3} registers{spilled}  "
        f"{report.shared_bytes // 1024:3} KiB shared  occupancy {report.occupancy(job):.0%}"
    )


if __name__ == "__main__":
    main()

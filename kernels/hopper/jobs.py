"""The rungs as jobs for `kernels.compiling`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.compiling.job import Job
from kernels.hopper.launch import HEADDIMS, RUNGS, launch_of


def hopper_jobs(target: str) -> dict[str, Job]:
    """Every rung in every head dimension, for Hopper: no other target has its instructions. {name: job}."""
    jobs = rung_jobs() if target == "sm_90" else {}
    return {f"{rung} d={headdim}": job for (rung, headdim), job in jobs.items()}


def rung_jobs(dtype: torch.dtype = torch.bfloat16, causal: bool = True) -> dict[tuple[str, int], Job]:
    """Every rung in every head dimension, with its tiles of 128 × 128: {(rung, headdim): job}."""
    return {(rung, headdim): _rung_job(rung, headdim, dtype, causal) for rung in RUNGS for headdim in HEADDIMS}


def _rung_job(rung: str, headdim: int, dtype: torch.dtype, causal: bool) -> Job:
    q, k, v, out = (torch.empty(1, 256, nheads, headdim, dtype=dtype) for nheads in (4, 2, 2, 4))
    launch = launch_of(q, k, v, out, torch.empty(1, 4, 256), causal)
    return job_of(f"{RUNGS[rung].__name__}:forward", launch.arguments, launch.num_warps)


def job_of(kernel: str, arguments: list[Any], num_warps: int) -> Job:
    """The compilation that a launch with these arguments needs.

    Args:
        kernel: module and function, such as "kernels.hopper.rung2_pipelined:forward".
        arguments: as for a launch; the tensors may be on the CPU.
        num_warps: of the block, or of its first partition.
    """
    module, name = kernel.split(":")
    parameters = getattr(importlib.import_module(module), name).params
    values = dict(zip((parameter.name for parameter in parameters), arguments, strict=False)) | {"num_warps": num_warps}
    constants = {parameter.name: values[parameter.name] for parameter in parameters if parameter.is_constexpr}
    signature = {
        parameter.name: _type(values[parameter.name]) for parameter in parameters if not parameter.is_constexpr
    }
    return Job(kernel, signature, constants, "sm_90", num_warps)


def _type(value: Any) -> str:
    """An argument's type as a launch finds it: Triton specialises on the value 1 and on multiples of 16."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{canonicalize_dtype(value.base.dtype)}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, Tensor):
        return f"*{canonicalize_dtype(value.dtype)}" + (":16" if value.data_ptr() % 16 == 0 else "")
    if isinstance(value, float):
        return "fp32"
    return "1" if value == 1 else "i32:16" if value % 16 == 0 else "i32"

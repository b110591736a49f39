"""Compiles every rung, and the kernels that are not attention, for sm_90a; prints what came out as JSON.

A process of its own, without TRITON_INTERPRET: under it a kernel cannot be compiled.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import torch

from kernels.emulator.example import double_kernel
from kernels.hopper.__main__ import compile_rung, table
from kernels.hopper.compiled import Compiled, compile_for_hopper
from kernels.hopper.launch import HEADDIMS, RUNGS
from tests.emulator import kernels


def main() -> None:
    compiled = {
        f"{rung} {headdim} {str(dtype).removeprefix('torch.')} {'causal' if causal else 'full'}": compile_rung(
            rung, headdim, dtype, causal
        )
        for rung in RUNGS
        for headdim in HEADDIMS
        for dtype, causal in ((torch.bfloat16, True), (torch.float16, False))
    }
    compiled |= others()
    reports = {name: asdict(one) | {"handed_over": handed_over(one), "ptx": ""} for name, one in compiled.items()}
    print(json.dumps({"kernels": reports, "table": table()}))


def handed_over(compiled: Compiled) -> list[int]:
    """The numbers of registers that warps set for themselves."""
    return sorted({int(number) for number in re.findall(r"setmaxnreg\S+\s+(\d+)", compiled.ptx)})


def others() -> dict[str, Compiled]:
    a, b = torch.empty(128, 128).half(), torch.empty(64, 128).half()
    x = torch.empty(32, 64).half()
    _, copy_arguments, _ = kernels.copy(x, [32, 64])
    _, gemm_arguments, _ = kernels.gemm(a, b, (128, 64, 64))
    _, e4m3_arguments, _ = kernels.gemm(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), (128, 64, 64))
    return {
        "copy": compile_for_hopper(kernels.copy_kernel, copy_arguments, 4),
        "example": compile_for_hopper(double_kernel, [*copy_arguments, True], 4),
        "double": compile_for_hopper(kernels.double_kernel, [x, x, 32, 64, 32, 64], 4),
        "gemm": compile_for_hopper(kernels.gemm_kernel, gemm_arguments, 8),
        "gemm e4m3": compile_for_hopper(kernels.gemm_kernel, e4m3_arguments, 8),
        "specialized gemm": compile_for_hopper(kernels.specialized_gemm_kernel, gemm_arguments, 8),
    }


if __name__ == "__main__":
    main()

"""One small Triton matmul in each precision, compared with float64. `kernels.runtime` runs it in a child process.

    TRITON_INTERPRET=1 python -m kernels.self_test cpu

It needs its own process, because Triton reads TRITON_INTERPRET when a kernel is decorated, on import.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 32
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """One program, one tile: out = a @ b, fp32. Row 2, column 3 of a 32 × 32 matrix lies at offset 2·32 + 3 = 67."""
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    offsets = rows * SIZE + columns
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(out_ptr + offsets, tl.dot(a, b, input_precision=PRECISION))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for 32 × 32 matrices, by `matmul_kernel` in full precision."""
    out = torch.empty(SIZE, SIZE, device=a.device)
    matmul_kernel[(1,)](a, b, out, SIZE=SIZE, PRECISION="ieee")
    return out


def run(device: str) -> dict[str, float]:
    """For each precision the largest error of Triton's product over its budget: at most 1 is right."""
    generator = torch.Generator().manual_seed(0)
    ratios = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(SIZE, SIZE, generator=generator).to(device, dtype) for _ in range(2))
        ratios[name] = error_ratio(matmul(a, b), a, b)
    return ratios


def error_ratio(out: Tensor, a: Tensor, b: Tensor) -> float:
    """The error of `out` over the budget: twice torch's in the same precision, and a few roundings."""
    reference = a.double() @ b.double()
    budget = 2 * ((a @ b).double() - reference).abs().max() + 4 * torch.finfo(a.dtype).eps * reference.abs().max()
    return float((out.double() - reference).abs().max() / budget)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))

"""`python -m kernels.emulator`: a kernel that is right, and the same with a fault, on this CPU."""

from __future__ import annotations

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.emulator import Report, emulate
from kernels.emulator.example import double_kernel


def main() -> None:
    """Runs `example.py` with its fence, in 51 orders, then without."""
    x = torch.randn(100, 64, dtype=torch.float16)
    out = torch.zeros_like(x)
    run = emulate(double_kernel, (4,), *_blocks(x, out), FENCED=True, explore=50)
    print(f"example.py, 4 programs in {run.interleavings} orders: right is {torch.equal(out, 2 * x)}\n")
    try:
        emulate(double_kernel, (4,), *_blocks(x, out), FENCED=False)
    except Report as report:
        print(f"The same without its fence:\n{report}\n")


def _blocks(*matrices: torch.Tensor) -> list[TensorDescriptor]:
    layout = gl.NVMMASharedLayout.get_default_for([32, 64], gl.float16)
    return [TensorDescriptor.from_tensor(matrix, [32, 64], layout) for matrix in matrices]


if __name__ == "__main__":
    main()

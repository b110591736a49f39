"""`python -m kernels.emulator`: a kernel that is right, the same with a fault, and attention for Hopper on this CPU."""

from __future__ import annotations

import time

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.emulator import Report, emulate
from kernels.emulator.example import double_kernel
from kernels.hopper.launch import RUNGS, attention


def main() -> None:
    show_example()
    show_attention()


def show_example() -> None:
    x = torch.randn(100, 64, dtype=torch.float16)
    out = torch.zeros_like(x)
    run = emulate(double_kernel, (4,), *_blocks(x, out), FENCED=True, explore=50)
    print(f"example.py, 4 programs in {run.interleavings} orders: right is {torch.equal(out, 2 * x)}\n")
    try:
        emulate(double_kernel, (4,), *_blocks(x, out), FENCED=False)
    except Report as report:
        print(f"The same without its fence:\n{report}\n")


def show_attention() -> None:
    q, k, v = torch.randn(3, 1, 256, 1, 64).bfloat16()
    exact = torch.softmax((q[0, :, 0] @ k[0, :, 0].T).double() / 8, -1) @ v[0, :, 0].double()
    for rung in RUNGS:
        start = time.perf_counter()
        result, _ = attention(q, k, v, rung=rung)
        seconds = time.perf_counter() - start
        error = (result[0, :, 0].double() - exact).abs().max()
        print(f"attention of 256 tokens by {rung}: {seconds:.2f} s, largest difference from float64 {error:.0e}")


def _blocks(*matrices: torch.Tensor) -> list[TensorDescriptor]:
    layout = gl.NVMMASharedLayout.get_default_for([32, 64], gl.float16)
    return [TensorDescriptor.from_tensor(matrix, [32, 64], layout) for matrix in matrices]


if __name__ == "__main__":
    main()

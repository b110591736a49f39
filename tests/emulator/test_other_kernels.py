"""Kernels that are not attention are right in the emulator, at sizes that do not divide the tiles."""

import pytest
import torch

from kernels.emulator import Deadlock, emulate
from minillm.measure import assert_within_budget
from tests.emulator.kernels import copy, copy_kernel, double_kernel, gemm, gemm_kernel, specialized_gemm_kernel

TYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_copy_by_the_copy_engine_is_exact(dtype):
    x = torch.randn(100, 136, generator=torch.Generator().manual_seed(0)).to(dtype)
    grid, arguments, out = copy(x, [64, 64])
    assert emulate(copy_kernel, grid, *arguments).programs == 6
    assert torch.equal(out, x)


def test_descriptors_made_in_the_kernel_and_a_tile_changed_in_place():
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).half()
    out = torch.zeros_like(x)
    emulate(double_kernel, (1,), x, out, 100, 64, 32, 64, explore=20)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kernel", [gemm_kernel, specialized_gemm_kernel], ids=["in turn", "specialised"])
def test_a_product_is_within_the_budget_in_every_order(kernel, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 336, generator=generator).to(dtype) for size in (150, 80))
    grid, arguments, c = gemm(a, b, (128, 64, 64))
    run = emulate(kernel, grid, *arguments, num_warps=8, explore=10)
    assert run.programs == 4 and run.different == 11
    naive = a.float() @ b.float().T
    assert_within_budget(c, naive, a.double() @ b.double().T, multiple=8)


def test_a_ring_of_one_slot_under_a_loop_that_loads_one_ahead_hangs_and_is_named():
    a = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).half()
    grid, arguments, _ = gemm(a, a, (128, 64, 64))
    arguments[-1] = 1
    with pytest.raises(Deadlock, match="all warps waits for ready, phase 0"):
        emulate(gemm_kernel, grid, *arguments, num_warps=8)

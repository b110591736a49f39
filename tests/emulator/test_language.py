"""What the emulator takes for Gluon's words, what it refuses, and what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from kernels.emulator import (
    BadBarrier,
    BadLayout,
    MissingFence,
    NotModelled,
    OutOfBounds,
    Race,
    UseAfterFree,
    emulate,
)
from kernels.emulator.example import double_kernel
from kernels.hopper.compat import allocate_barriers, tma_load, tma_store
from tests.emulator.kernels import rows

ROOT = Path(__file__).resolve().parent.parent.parent
ROW = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
TILE = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


# ---- numbers ----


@gluon.jit
def numbers_kernel(a, b, out_ptr):
    gl.store(out_ptr, a // b)
    gl.store(out_ptr + 1, a % b)
    gl.store(out_ptr + 2, gl.cdiv(a, b))
    gl.store(out_ptr + 3, gl.maximum(a, b) * 2 - (a & 3))


def test_integers_divide_as_in_c():
    out = torch.zeros(4, dtype=torch.int32)
    emulate(numbers_kernel, (1,), -7, 2, out)
    assert out.tolist() == [-3, -1, -3, 3]


@gluon.jit
def softmax_kernel(x_ptr, out_ptr, columns, COLUMNS: gl.constexpr):
    row = gl.program_id(0)
    column = gl.arange(0, COLUMNS, ROW)
    x = gl.load(x_ptr + row * columns + column, mask=column < columns, other=float("-inf"))
    p = gl.exp(x - gl.max(x, 0))
    gl.store(out_ptr + row * columns + column, p / gl.sum(p, 0), mask=column < columns)


def test_pointers_masks_and_reductions_give_a_softmax():
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    assert emulate(softmax_kernel, (5,), x, out, 100, 128).programs == 5
    assert (out.double() - torch.softmax(x.double(), 1)).abs().max() < 4 * torch.finfo(torch.float32).eps


@gluon.jit
def unmasked_kernel(x_ptr, COLUMNS: gl.constexpr):
    gl.store(x_ptr + gl.arange(0, COLUMNS, ROW), 0.0)


def test_a_pointer_past_the_end_is_named():
    with pytest.raises(OutOfBounds, match="x_ptr has 100 elements, and element 100 is asked for"):
        emulate(unmasked_kernel, (1,), torch.zeros(100), 128)


@gluon.jit
def saturate_kernel(x_ptr, out_ptr):
    columns = gl.arange(0, 4, ROW)
    gl.store(out_ptr + columns, gl.load(x_ptr + columns).to(gl.float8e4nv))


def test_e4m3_saturates():
    out = torch.zeros(4, dtype=torch.float8_e4m3fn)
    emulate(saturate_kernel, (1,), torch.tensor([1.0, 1000.0, -1000.0, 448.0]), out)
    assert out.float().tolist() == [1, 448, -448, 448]


# ---- what does not fit ----


@gluon.jit
def two_layouts_kernel():
    gl.arange(0, 128, ROW) + gl.arange(0, 128, gl.SliceLayout(0, TILE))


@gluon.jit
def wrong_slice_kernel():
    gl.arange(0, 16, gl.SliceLayout(0, TILE))[:, None]


@gluon.jit
def not_a_power_of_two_kernel():
    gl.arange(0, 100, ROW)


@gluon.jit
def warps_kernel(source, WARPS: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr):
    a = gl.allocate_shared_memory(source.dtype, [ROWS, 64], source.layout)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    warpgroup_mma(a, a.permute((1, 0)), gl.full([ROWS, ROWS], 0.0, gl.float32, layout))


@gluon.jit
def registers_kernel(source):
    a = gl.full([64, 64], 1.0, source.dtype, TILE)
    b = gl.allocate_shared_memory(source.dtype, [64, 64], source.layout)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    warpgroup_mma(a, b, gl.full([64, 64], 0.0, gl.float32, layout))


@gluon.jit
def other_block_kernel(source):
    tile = gl.allocate_shared_memory(source.dtype, [32, 64], source.layout)
    tma_load(source, [0, 0], allocate_barriers(1, 1).index(0), tile)


@pytest.mark.parametrize(
    "kernel, constants, message",
    [
        (two_layouts_kernel, None, "tensors in different layouts meet: BlockedLayout.* and SliceLayout"),
        (wrong_slice_kernel, None, "a dimension cannot be put in at 1 .*\n.*\n.*make it with gl.SliceLayout"),
        (not_a_power_of_two_kernel, None, "every size must be a power of two"),
        (warps_kernel, (8, 128, 128), "laid out for 8 warps, and 4 run this"),
        (warps_kernel, (4, 32, 32), "does not fit a product of 32 × 32"),
        (warps_kernel, (4, 64, 48), r"instr_shape \[16, 48, 16\] does not fit a product of 64 × 64"),
        (registers_kernel, (), "a of warpgroup_mma, in registers, is in BlockedLayout"),
        (other_block_kernel, (), r"the descriptor's block has the shape \[16, 64\], tile \[32, 64\]"),
    ],
)
def test_what_the_compiler_or_the_gpu_would_refuse_is_named(kernel, constants, message):
    source = [] if constants is None else [*rows(torch.zeros(16, 64).half()), *constants]
    with pytest.raises(BadLayout, match=message):
        emulate(kernel, (1,), *source)


@gluon.jit
def histogram_kernel():
    gl.histogram(gl.arange(0, 128, ROW), 16)


def test_what_is_not_modelled_is_named():
    with pytest.raises(NotModelled, match=r"does not know gl\.histogram"):
        emulate(histogram_kernel, (1,))
    with pytest.raises(NotModelled, match=r"does not know the type torch\.float64"):
        emulate(unmasked_kernel, (1,), torch.zeros(128).double(), 128)


def test_only_gluon_kernels_are_taken():
    with pytest.raises(TypeError, match=r"kernel is function, wants a function decorated with @gluon\.jit"):
        emulate(rows, (1,))
    with pytest.raises(TypeError, match="x_ptr is list"):
        emulate(unmasked_kernel, (1,), [1.0], 128)


# ---- shared memory, engines, barriers ----


@gluon.jit
def shifted_kernel(source, target, row, column):
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = allocate_barriers(1, 1).index(0)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma_load(source, [row, column], landed, tile)
    mbarrier.wait(landed, 0)
    tma_store(target, [0, 0], tile)
    tma.store_wait(0)


@pytest.mark.parametrize("row, column", [(-5, 0), (0, -8), (10, 16), (100, 0)])
def test_a_copy_from_outside_the_tensor_brings_zeros(row, column):
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).half()
    out = torch.full((16, 64), 7.0).half()
    emulate(shifted_kernel, (1,), *rows(x, out), row, column)
    framed = torch.nn.functional.pad(x, (64, 64, 200, 200))
    assert torch.equal(out, framed[200 + row :, 64 + column :][:16, :64])


def test_the_example_is_right_with_its_fence_and_named_without():
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).half()
    out = torch.zeros_like(x)
    assert emulate(double_kernel, (7,), *rows(x, out), FENCED=True, explore=20).interleavings == 21
    assert torch.equal(out, 2 * x)
    with pytest.raises(MissingFence, match="on tile: threads, then an engine"):
        emulate(double_kernel, (7,), *rows(x, out), FENCED=False)


@gluon.jit
def refill_kernel(source, FENCED: gl.constexpr):
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = allocate_barriers(1, 1).index(0)
    for i in range(2):
        mbarrier.expect(landed, source.block_type.nbytes)
        tma_load(source, [i * 16, 0], landed, tile)
        mbarrier.wait(landed, i)
        tile.load(TILE)
        if FENCED:
            fence_async_shared()


def test_a_tile_that_threads_have_read_is_refilled_only_behind_a_fence():
    source = rows(torch.zeros(32, 64).half())
    emulate(refill_kernel, (1,), *source, True, explore=5)
    with pytest.raises(MissingFence, match="on tile"):
        emulate(refill_kernel, (1,), *source, False)


@gluon.jit
def write_part(tile, done):
    tile.store(gl.full([16, 16], 1.0, gl.float32, TILE))
    mbarrier.arrive(done)


@gluon.jit
def read_part(tile, done, WAITS: gl.constexpr):
    if WAITS:
        mbarrier.wait(done, 0)
    tile.load(TILE)


@gluon.jit
def handover_kernel(WAITS: gl.constexpr, REGISTERS: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.float32, [16, 16], SHARED)
    done = allocate_barriers(1, 1).index(0)
    gl.warp_specialize([(write_part, (tile, done)), (read_part, (tile, done, WAITS))], [4], [REGISTERS])


def test_two_partitions_hand_a_tile_over_by_a_barrier_or_race_for_it():
    run = emulate(handover_kernel, (1,), True, 24, explore=50)
    assert run.different > 10
    with pytest.raises(
        Race, match=r"on tile: (.|\n)*store to tile(.|\n)*write_part(.|\n)*load from tile(.|\n)*read_part"
    ):
        emulate(handover_kernel, (1,), False, 24)


def test_a_number_of_registers_that_setmaxnreg_does_not_take_is_named():
    for registers in (20, 25, 264):
        with pytest.raises(BadLayout, match="setmaxnreg takes 24 to 256, in steps of 8"):
            emulate(handover_kernel, (1,), True, registers)


@gluon.jit
def tensor_to_worker_kernel():
    tile = gl.full([16, 16], 1.0, gl.float32, TILE)
    gl.warp_specialize([(read_part, (tile, tile, False)), (read_part, (tile, tile, False))], [4])


def test_a_worker_cannot_be_given_registers():
    with pytest.raises(
        BadLayout, match="read_part gets a tensor in registers, which only the first partition can take"
    ):
        emulate(tensor_to_worker_kernel, (1,))


@gluon.jit
def freed_in_use_kernel(source):
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = allocate_barriers(1, 1).index(0)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma_load(source, [0, 0], landed, tile)
    tile._keep_alive()


@gluon.jit
def freed_kernel(BARRIER: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.float32, [16, 16], SHARED)
    done = allocate_barriers(1, 1).index(0)
    if BARRIER:
        mbarrier.invalidate(done)
        mbarrier.arrive(done)
    else:
        tile._keep_alive()
        tile.store(gl.full([16, 16], 1.0, gl.float32, TILE))


def test_what_was_given_back_cannot_be_used():
    with pytest.raises(UseAfterFree, match="tile is used after it was freed"):
        emulate(freed_kernel, (1,), False)
    with pytest.raises(UseAfterFree, match="tile is freed while it is still in use"):
        emulate(freed_in_use_kernel, (1,), *rows(torch.zeros(16, 64).half()))
    with pytest.raises(BadBarrier, match="done is not initialised, or no more"):
        emulate(freed_kernel, (1,), True)


def test_a_seed_gives_the_same_orders_every_time():
    assert emulate(handover_kernel, (2,), True, 24, explore=30, seed=3) == emulate(
        handover_kernel, (2,), True, 24, explore=30, seed=3
    )


def test_the_report_says_which_program_and_which_order():
    with pytest.raises(Race) as caught:
        emulate(handover_kernel, (1,), False, 24)
    assert caught.value.__notes__ == ["in program (0, 0, 0) of (1, 1, 1), interleaving 0, seed 0"]


def test_the_emulator_runs_under_the_interpreters_variable_too():
    """Other kernels' tests set TRITON_INTERPRET=1, and Gluon has no interpreter of its own."""
    command = [sys.executable, "-m", "kernels.emulator"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "in 51 orders: right is True" in child.stdout and "missing fence: on tile" in child.stdout

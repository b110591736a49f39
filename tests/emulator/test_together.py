"""Shared memory, engines, barriers and partitions: what they may do together, and what is named."""

import re

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.emulator import (
    BadBarrier,
    BadLayout,
    MissingFence,
    OutOfBounds,
    Race,
    UseAfterFree,
    WrongArrivals,
    emulate,
)
from kernels.emulator.example import double_kernel
from kernels.gluon_names import allocate_barriers, tma_load, tma_store
from tests.emulator.kernels import SHARED, SUMS, SWIZZLED, TILE, rows


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


def test_every_order_begins_with_the_tensors_as_they_were():
    x = torch.zeros(100, 64).half()
    x[0, 0] = 1
    emulate(double_kernel, (7,), *rows(x, x), FENCED=True, explore=3)
    assert x[0, 0] == 2


@gluon.jit
def nothing():
    pass


@gluon.jit
def one_worker(WARPS: gl.constexpr, REGISTERS: gl.constexpr):
    gl.warp_specialize([(nothing, ()), (nothing, ())], [WARPS], [REGISTERS])


@gluon.jit
def workers_kernel(NESTED: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr):
    if NESTED:
        gl.warp_specialize([(one_worker, (WARPS, REGISTERS)), (nothing, ())], [WARPS], [REGISTERS])
    else:
        one_worker(WARPS, REGISTERS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((True, 4, 24), "warp_specialize inside warp_specialize"),
        ((False, 3, 24), r"workers of \[3\] warps"),
        ((False, 16, 128), "the workers take 65536 of 65536 registers"),
    ],
)
def test_workers_that_a_block_cannot_have_are_named(arguments, message):
    with pytest.raises(BadLayout, match=message):
        emulate(workers_kernel, (1,), *arguments)


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
    with pytest.raises(BadBarrier, match="done is not initialised, or was invalidated"):
        emulate(freed_kernel, (1,), True)


@gluon.jit
def halves_kernel(source, out_ptr, PART: gl.constexpr, WAIT: gl.constexpr):
    tile = gl.allocate_shared_memory(source.dtype, [32, 64], source.layout)
    landed = allocate_barriers(2, 1)
    for i in gl.static_range(2):
        mbarrier.expect(landed.index(i), source.block_type.nbytes)
        tma_load(source, [16 * i, 0], landed.index(i), tile.slice(16 * i, 16))
    mbarrier.wait(landed.index(WAIT), 0)
    row_starts = gl.arange(0, 16, gl.SliceLayout(1, TILE))[:, None] * 64
    places = row_starts + gl.arange(0, 64, gl.SliceLayout(0, TILE))[None, :]
    gl.store(out_ptr + places, tile.slice(16 * PART, 16).load(TILE))
    mbarrier.wait(landed.index(1 - WAIT), 0)


def test_a_part_of_a_tile_is_watched_by_itself():
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).half()
    out = torch.zeros(16, 64).half()
    emulate(halves_kernel, (1,), *rows(x), out, 1, 1, explore=10)
    assert torch.equal(out, x[16:])
    with pytest.raises(Race, match=r"on tile\[16:32\]"):
        emulate(halves_kernel, (1,), *rows(x), out, 1, 0)


@gluon.jit
def last_slot_kernel(GUARDED: gl.constexpr):
    slots = allocate_barriers(2, 1)
    for i in range(2):
        mbarrier.arrive(slots.index((i - 1) % 2), pred=(i >= 1) | (not GUARDED))


def test_a_slot_outside_counts_only_where_it_is_used():
    emulate(last_slot_kernel, (1,), True)
    with pytest.raises(OutOfBounds, match="slots has 2 parts, and part -1 is used"):
        emulate(last_slot_kernel, (1,), False)


@gluon.jit
def gluons_barriers_kernel():
    slots = mbarrier.allocate_mbarrier(batch=2)
    mbarrier.init(slots.index(1), count=1)
    mbarrier.arrive(slots.index(1))
    mbarrier.wait(slots.index(1), 0)


@pytest.mark.skipif(not hasattr(mbarrier, "allocate_mbarrier"), reason="triton 3.6 has no such word: not verified")
def test_gluons_word_for_barriers_gives_them_uninitialised():
    emulate(gluons_barriers_kernel, (1,))


@gluon.jit
def arrivals_kernel():
    mbarrier.arrive(allocate_barriers(1, 1).index(0), count=2)


@gluon.jit
def dropped_barrier_kernel(source):
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = allocate_barriers(1, 1).index(0)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma_load(source, [0, 0], landed, tile)
    mbarrier.invalidate(landed)


def test_a_barrier_is_not_used_against_its_count_or_dropped_under_a_copy():
    with pytest.raises(WrongArrivals, match="gets 2 arrivals in phase 0, which lacks 1"):
        emulate(arrivals_kernel, (1,))
    with pytest.raises(Race, match="on landed: nothing orders these two"):
        emulate(dropped_barrier_kernel, (1,), *rows(torch.zeros(16, 64).half()))


@gluon.jit
def early_use_kernel(out_ptr, USE: gl.constexpr):
    a = gl.allocate_shared_memory(gl.float16, [64, 64], SWIZZLED, gl.full([64, 64], 1.0, gl.float16, TILE))
    fence_async_shared()
    zero = gl.zeros([64, 64], gl.float32, SUMS)
    acc = warpgroup_mma(a, a, hopper.warpgroup_mma_init(zero), is_async=True)
    gl.static_assert(acc.dtype == gl.float32 and acc.shape[0] == 64)  # the type is known at once
    if USE == "where":
        gl.where(zero == 0.0, acc, 0.0)
    elif USE == "exp2":
        gl.exp2(acc)
    elif USE == "maximum":
        gl.maximum(acc, 0.0)
    elif USE == "compare":
        zero = acc > 0.0
    elif USE == "negate":
        zero = -acc
    elif USE == "add":
        zero = zero + acc
    elif USE == "store":
        gl.store(out_ptr + gl.arange(0, 64, gl.SliceLayout(1, SUMS))[:, None], acc)
    elif USE == "two products":
        first = warpgroup_mma(a, a, acc, is_async=True)
        acc = warpgroup_mma(a, a, acc, is_async=True)
        first, acc = warpgroup_mma_wait(0, deps=(first, acc))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.store(out_ptr, gl.max(gl.max(acc, 1), 0))


@pytest.mark.parametrize(
    "use, line",
    [
        ("where", "gl.where(zero == 0.0, acc, 0.0)"),
        ("exp2", "gl.exp2(acc)"),
        ("maximum", "gl.maximum(acc, 0.0)"),
        ("compare", "zero = acc > 0.0"),
        ("negate", "zero = -acc"),
        ("add", "zero = zero + acc"),
        ("store", "gl.store(out_ptr + gl.arange"),
        ("two products", "acc = warpgroup_mma(a, a, acc, is_async=True)"),
    ],
)
def test_an_accumulator_in_flight_is_not_to_be_used_in_any_way(use, line):
    with pytest.raises(Race, match=f"on the accumulator.*\n.*warpgroup_mma of a and a.*\n.*{re.escape(line)}"):
        emulate(early_use_kernel, (1,), torch.zeros(64), use)


def test_an_accumulator_that_was_waited_for_is_a_tensor():
    out = torch.zeros(64)
    emulate(early_use_kernel, (1,), out, "", explore=5)
    assert out[0] == 64


def test_a_seed_gives_the_same_orders_every_time():
    assert len({emulate(handover_kernel, (2,), True, 24, explore=30, seed=3) for _ in range(2)}) == 1


def test_the_report_says_which_program_and_which_order():
    with pytest.raises(Race) as caught:
        emulate(handover_kernel, (1,), False, 24)
    assert caught.value.__notes__ == ["in program (0, 0, 0) of (1, 1, 1), interleaving 0, seed 0"]

"""A slot of which only a part was written, and the names of partitions that share a function."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from kernels.emulator import Deadlock, Race, Unwritten, emulate
from kernels.gluon_names import allocate_barriers, tma_load
from tests.emulator.kernels import SHARED, SUMS, SWIZZLED, TILE, rows


@gluon.jit
def half_kernel(source, HALVES: gl.constexpr, READ: gl.constexpr):
    """A ring of two slots of 64 × 64. Copies bring some halves of slot 1; then slot 1 is read."""
    ring = gl.allocate_shared_memory(source.dtype, [2, 64, 64], SWIZZLED)
    slot = ring.index(1)
    landed = allocate_barriers(1, 1).index(0)
    mbarrier.expect(landed, source.block_type.nbytes * HALVES)
    for i in gl.static_range(HALVES):
        tma_load(source, [0, 0], landed, slot.slice(32 * i, 32))
    mbarrier.wait(landed, 0)
    if READ == "threads":
        slot.load(TILE)
    elif READ == "the lower half":
        slot.slice(0, 32).load(TILE)
    elif READ == "product":
        zero = gl.zeros([64, 64], gl.float32, SUMS)
        warpgroup_mma(slot, slot.permute((1, 0)), zero)


def halves():
    (descriptor,) = rows(torch.ones(32, 64).half())
    descriptor.block_shape = [32, 64]
    return descriptor


@pytest.mark.parametrize("read", ["threads", "product"])
def test_a_slot_half_written_is_unwritten(read):
    emulate(half_kernel, (1,), halves(), 2, read)
    with pytest.raises(Unwritten, match=r"ring\[1\] is read, and only 2048 of its 4096 elements(.|\n)*copy into ring"):
        emulate(half_kernel, (1,), halves(), 1, read)


def test_the_half_that_was_written_may_be_read():
    emulate(half_kernel, (1,), halves(), 1, "the lower half")


@gluon.jit
def fill(tile, done, ME: gl.constexpr, ARRIVES: gl.constexpr):
    tile.slice(8 * ME, 8).store(gl.full([8, 16], 1.0, gl.float32, TILE))
    if ARRIVES:
        mbarrier.arrive(done)


@gluon.jit
def use(tile, done):
    mbarrier.wait(done, 0)
    tile.load(TILE)


@gluon.jit
def two_fillers_kernel(ARRIVALS: gl.constexpr):
    tile = gl.allocate_shared_memory(gl.float32, [16, 16], SHARED)
    done = allocate_barriers(1, ARRIVALS).index(0)
    gl.warp_specialize(
        [(use, (tile, done)), (fill, (tile, done, 0, True)), (fill, (tile, done, 1, ARRIVALS > 1))], [4, 4]
    )


def test_a_slot_whose_second_half_nothing_orders_is_a_race_or_unwritten_in_every_order():
    emulate(two_fillers_kernel, (1,), 2, explore=20)
    for seed in range(5):
        with pytest.raises((Race, Unwritten), match=r"on tile: nothing orders|only 128 of its 256 elements"):
            emulate(two_fillers_kernel, (1,), 1, explore=20, seed=seed)


@gluon.jit
def waiter(done, PHASE: gl.constexpr):
    mbarrier.wait(done, PHASE)


@gluon.jit
def waiters_kernel():
    done = allocate_barriers(1, 1).index(0)
    gl.warp_specialize([(waiter, (done, 1)), (waiter, (done, 1)), (waiter, (done, 0))], [4, 4])


@gluon.jit
def one_slot_kernel():
    tile = gl.allocate_shared_memory(gl.float32, [16, 16], SHARED)
    done = allocate_barriers(1, 2).index(0)
    gl.warp_specialize([(fill, (tile, done, 0, True)), (fill, (tile, done, 0, True))], [4])


def test_partitions_that_share_a_function_are_numbered():
    with pytest.raises(Deadlock, match="waiter 2 waits for done, phase 0"):
        emulate(waiters_kernel, (1,))
    with pytest.raises(Race, match=r"store to tile.*\[fill 0\](.|\n)*store to tile.*\[fill 1\]"):
        emulate(one_slot_kernel, (1,))

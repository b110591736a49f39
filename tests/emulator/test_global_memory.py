"""Global memory: what `store_wait` waits for, what a masked load leaves, and accesses that nothing orders."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.emulator import MissingFence, NotModelled, Race, emulate, language, launch
from kernels.gluon_names import allocate_barriers, tma_load, tma_store
from tests.emulator.kernels import ROW, TILE, rows


@gluon.jit
def write_global(x_ptr, done, FIRST: gl.constexpr):
    gl.store(x_ptr + FIRST + gl.arange(0, 128, ROW), 1.0)
    mbarrier.arrive(done)


@gluon.jit
def copy_global(x_ptr, done, WAITS: gl.constexpr):
    if WAITS:
        mbarrier.wait(done, 0)
    gl.store(x_ptr + 128 + gl.arange(0, 128, ROW), gl.load(x_ptr + gl.arange(0, 128, ROW)))


@gluon.jit
def two_writers_kernel(x_ptr, WAITS: gl.constexpr, FIRST: gl.constexpr):
    done = allocate_barriers(1, 1).index(0)
    gl.warp_specialize([(write_global, (x_ptr, done, FIRST)), (copy_global, (x_ptr, done, WAITS))], [4], [24])


def test_two_partitions_hand_global_memory_over_by_a_barrier_or_race_for_it():
    x = torch.zeros(256)
    emulate(two_writers_kernel, (1,), x, True, 0, explore=20)
    assert torch.equal(x, torch.ones(256))
    with pytest.raises(Race, match=r"on x_ptr: nothing orders these two\n  store .*write_global.*\n  load .*copy_glo"):
        emulate(two_writers_kernel, (1,), torch.zeros(256), False, 0)
    with pytest.raises(Race, match=r"nothing orders these two\n  store .*write_global.*\n  store .*copy_global"):
        emulate(two_writers_kernel, (1,), torch.zeros(256), False, 128)


def test_two_partitions_may_touch_different_elements_of_one_tensor():
    x = torch.zeros(512)
    emulate(two_writers_kernel, (1,), x, False, 256, explore=20)
    assert x.sum() == 128


@gluon.jit
def fill_columns(x_ptr, FIRST: gl.constexpr):
    gl.store(x_ptr + FIRST + 2 * gl.arange(0, 128, ROW), 1.0)


@gluon.jit
def columns_kernel(x_ptr, SECOND: gl.constexpr):
    gl.warp_specialize([(fill_columns, (x_ptr, 0)), (fill_columns, (x_ptr, SECOND))], [4], [24])


def test_elements_between_anothers_elements_are_others():
    x = torch.zeros(258)
    emulate(columns_kernel, (1,), x, 1, explore=5)
    assert x.sum() == 256
    with pytest.raises(Race, match=r"store to x_ptr.*\[fill_columns 0\](.|\n)*store to x_ptr.*\[fill_columns 1\]"):
        emulate(columns_kernel, (1,), x, 2)


def test_a_result_that_hangs_on_the_order_is_a_race():
    """What the records of accesses do not see: the results of all orders are compared as well."""
    launch._check_same("x_ptr", torch.ones(8), torch.ones(8), "here")
    with pytest.raises(Race, match="x_ptr does not end as in the plain order, from element 5 on"):
        launch._check_same("x_ptr", torch.eye(8)[5], torch.zeros(8), "here")


@gluon.jit
def twice_kernel(source, target, target_ptr, AGAIN: gl.constexpr):
    """Copies to target; then touches target again, by the copy engine or by threads."""
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = allocate_barriers(1, 1).index(0)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma_load(source, [0, 0], landed, tile)
    mbarrier.wait(landed, 0)
    tma_store(target, [0, 0], tile)
    tma.store_wait(0)
    if AGAIN == "load":
        mbarrier.expect(landed, source.block_type.nbytes)
        tma_load(target, [8, 0], landed, tile)
        mbarrier.wait(landed, 1)
    elif AGAIN == "below":
        mbarrier.expect(landed, source.block_type.nbytes)
        tma_load(target, [16, 0], landed, tile)
        mbarrier.wait(landed, 1)
    elif AGAIN == "store":
        tma_store(target, [0, 0], tile)
        tma.store_wait(0)
    elif AGAIN == "threads":
        gl.load(target_ptr + gl.arange(0, 128, ROW))


def run_twice(again, **options):
    x, out = torch.rand(16, 64).half(), torch.zeros(32, 64).half()
    emulate(twice_kernel, (1,), *rows(x, out), out, again, **options)
    assert torch.equal(out[:16], x)


@pytest.mark.parametrize("again", ["load", "store", "threads"])
def test_store_wait_waits_for_the_reads_of_shared_memory_and_not_for_the_writes(again):
    with pytest.raises(
        Race, match=r"on target(_ptr)?: nothing orders(.|\n)*TMA copy out(.|\n)*have read shared memory"
    ):
        run_twice(again)


@pytest.mark.parametrize("again", ["", "below"])
def test_the_end_of_the_kernel_waits_for_the_writes(again):
    run_twice(again, explore=20)


@pytest.mark.parametrize("again", ["load", "store", "threads"])
def test_store_wait_of_triton_3_8_waits_for_the_writes_where_it_is_told_to(again, monkeypatch):
    waits = language.tma._members["store_wait"]
    monkeypatch.setitem(language.tma._members, "store_wait", lambda pendings: waits(pendings, read_only=False))
    monkeypatch.setattr(language, "WAITS_FOR_WRITES", False)
    with pytest.raises(NotModelled, match=r"no store_wait\(read_only=False\): from 3.8 on\n.*tma\.store_wait\(0\)"):
        run_twice(again)
    monkeypatch.setattr(language, "WAITS_FOR_WRITES", True)
    run_twice(again, explore=20)


@gluon.jit
def threads_then_engine_kernel(x_desc, x_ptr):
    """What threads write to global memory, the copy engine reads. No word of Gluon orders the two."""
    columns = gl.arange(0, 64, gl.SliceLayout(0, TILE))[None, :]
    gl.store(x_ptr + columns + gl.zeros([16, 64], gl.int32, TILE), 1.0)
    gl.barrier()
    fence_async_shared()
    tile = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    landed = allocate_barriers(1, 1).index(0)
    mbarrier.expect(landed, x_desc.block_type.nbytes)
    tma_load(x_desc, [0, 0], landed, tile)
    mbarrier.wait(landed, 0)


def test_what_threads_write_to_global_memory_the_copy_engine_may_not_see():
    x = torch.zeros(16, 64).half()
    with pytest.raises(MissingFence, match=r"on x_desc: threads write, then an engine\n  store to x_ptr(.|\n)*alone"):
        emulate(threads_then_engine_kernel, (1,), *rows(x), x)


@gluon.jit
def neighbours_kernel(x_ptr, SHIFT: gl.constexpr, MEETS: gl.constexpr):
    places = gl.arange(0, 128, ROW)
    gl.store(x_ptr + places, places.to(gl.float32))
    if MEETS:
        gl.barrier()
    x = gl.load(x_ptr + (places + SHIFT) % 128)
    if MEETS:
        gl.barrier()
    gl.store(x_ptr + places, x)


def test_threads_read_what_their_neighbours_wrote_only_after_a_barrier():
    x = torch.zeros(128)
    emulate(neighbours_kernel, (1,), x, 1, True)
    assert torch.equal(x, torch.arange(1.0, 129) % 128)
    emulate(neighbours_kernel, (1,), x, 0, False)  # each thread reads its own
    with pytest.raises(Race, match=r"one thread and then another(.|\n)*gl\.barrier\(\) between"):
        emulate(neighbours_kernel, (1,), x, 1, False)


@gluon.jit
def masked_kernel(x_ptr, out_ptr, OTHER: gl.constexpr):
    places = gl.arange(0, 128, ROW)
    gl.store(out_ptr + places, gl.load(x_ptr + places, mask=places < 3, other=OTHER))


@pytest.mark.parametrize(
    "dtype, poison",
    [(torch.float32, torch.nan), (torch.bfloat16, torch.nan), (torch.int32, -(2**31)), (torch.int8, -128)],
)
def test_a_masked_load_gives_other_or_poison(dtype, poison):
    x, out = torch.ones(3, dtype=dtype), torch.zeros(128, dtype=dtype)
    emulate(masked_kernel, (1,), x, out, 7)
    assert out.tolist() == [1] * 3 + [7] * 125
    emulate(masked_kernel, (1,), x, out, None)
    assert torch.equal(out[:3], x)
    assert torch.equal(out[3:].float(), torch.full((125,), poison).float()) or out[3:].isnan().all()

"""A first kernel: doubles a matrix through shared memory, with TMA copies in both directions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from kernels.gluon_names import tma_load, tma_store


@gluon.jit
def double_kernel(source, target, FENCED: gl.constexpr, num_warps: gl.constexpr):
    """target = 2 · source, one block a program; descriptors of (rows, columns). Without its fence it is wrong."""
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    row = gl.program_id(0) * source.block_type.shape[0]

    mbarrier.expect(landed, source.block_type.nbytes)
    tma_load(source, [row, 0], landed, tile)
    mbarrier.wait(landed, 0)
    registers: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    tile.store(tile.load(registers) * 2)
    if FENCED:
        fence_async_shared()
    tma_store(target, [row, 0], tile)
    tma.store_wait(0)

"""Gluon kernels that are not attention, for the emulator and for the compiler: a copy, two products."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gluon_names import allocate_barriers, tma_load, tma_store

# Layouts for four warps.
ROW = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
TILE = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))

GLUON_TYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def describe(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, GLUON_TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def rows(*tensors: torch.Tensor) -> list[TensorDescriptor]:
    """Descriptors of matrices with 64 columns, in blocks of 16 rows."""
    return [describe(tensor, [16, 64]) for tensor in tensors]


@gluon.jit
def copy_kernel(source, target):
    """Block by block, global to shared to global, without a register."""
    smem = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    ready = allocate_barriers(1, 1).index(0)
    row = gl.program_id(0) * source.block_type.shape[0]
    column = gl.program_id(1) * source.block_type.shape[1]
    mbarrier.expect(ready, source.block_type.nbytes)
    tma_load(source, [row, column], ready, smem)
    mbarrier.wait(ready, 0)
    tma_store(target, [row, column], smem)
    tma.store_wait(0)


def copy(x: torch.Tensor, block: list[int]) -> tuple[tuple[int, int], list, torch.Tensor]:
    """The grid and the arguments of `copy_kernel`, and the tensor that it fills."""
    out = torch.full_like(x, -1)
    grid = (-(-x.shape[0] // block[0]), -(-x.shape[1] // block[1]))
    return grid, [describe(x, block), describe(out, block)], out


@gluon.jit
def double_kernel(
    source_ptr, target_ptr, rows, columns, ROWS: gl.constexpr, COLUMNS: gl.constexpr, num_warps: gl.constexpr
):
    """target = 2 · source, in place in one tile, row block by row block; the descriptors are made in the kernel."""
    registers: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], gl.float16)
    source = tma.make_tensor_descriptor(source_ptr, [rows, columns], [columns, 1], [ROWS, COLUMNS], layout)
    target = tma.make_tensor_descriptor(target_ptr, [rows, columns], [columns, 1], [ROWS, COLUMNS], layout)
    tile = gl.allocate_shared_memory(gl.float16, [ROWS, COLUMNS], layout)
    ready = allocate_barriers(1, 1).index(0)
    for i in range(gl.cdiv(rows, ROWS)):
        mbarrier.expect(ready, ROWS * COLUMNS * 2)
        tma_load(source, [i * ROWS, 0], ready, tile)
        mbarrier.wait(ready, i & 1)
        tile.store(tile.load(registers) * 2)
        fence_async_shared()
        tma_store(target, [i * ROWS, 0], tile)
        tma.store_wait(0)


@gluon.constexpr_function
def product_layout(n, bits, num_warps):
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, n, 256 // bits])


@gluon.jit
def gemm_kernel(a_desc, b_desc, c_desc, STAGES: gl.constexpr, num_warps: gl.constexpr):
    """c = a @ bᵀ, a (M, K), b (N, K), c (M, N) fp32. A product stays in flight while the next tiles are awaited."""
    M: gl.constexpr = a_desc.block_type.shape[0]
    N: gl.constexpr = b_desc.block_type.shape[0]
    K: gl.constexpr = a_desc.block_type.shape[1]
    layout: gl.constexpr = product_layout(N, a_desc.dtype.primitive_bitwidth, num_warps)
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, M, K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, N, K], b_desc.layout)
    ready = allocate_barriers(STAGES, 1)
    row = gl.program_id(0) * M
    column = gl.program_id(1) * N
    tiles = gl.cdiv(a_desc.shape[1], K)
    for tile in range(STAGES - 1):
        load_pair(a_desc, b_desc, a_ring, b_ring, ready, row, column, tile, STAGES)
    acc = gl.full([M, N], 0.0, gl.float32, layout)
    for tile in range(tiles):
        slot = tile % STAGES
        mbarrier.wait(ready.index(slot), tile // STAGES & 1)
        acc = warpgroup_mma(a_ring.index(slot), b_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the product before this one has read its slot
        if tile + STAGES - 1 < tiles:
            load_pair(a_desc, b_desc, a_ring, b_ring, ready, row, column, tile + STAGES - 1, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    store_tile(c_desc, acc, row, column)


@gluon.jit
def load_pair(a_desc, b_desc, a_ring, b_ring, ready, row, column, tile, STAGES: gl.constexpr):
    K: gl.constexpr = a_desc.block_type.shape[1]
    slot = tile % STAGES
    mbarrier.expect(ready.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
    tma_load(a_desc, [row, tile * K], ready.index(slot), a_ring.index(slot))
    tma_load(b_desc, [column, tile * K], ready.index(slot), b_ring.index(slot))


@gluon.jit
def store_tile(c_desc, acc, row, column):
    c_smem = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)
    c_smem.store(acc.to(c_desc.dtype))
    fence_async_shared()
    tma_store(c_desc, [row, column], c_smem)
    tma.store_wait(0)


def gemm(a: torch.Tensor, b: torch.Tensor, tile: tuple[int, int, int]) -> tuple[tuple[int, int], list, torch.Tensor]:
    """The grid and the arguments of both GEMM kernels, and the tensor (M, N) that they fill."""
    m, n, k = tile
    c = torch.full((a.shape[0], b.shape[0]), torch.nan)
    grid = (-(-a.shape[0] // m), -(-b.shape[0] // n))
    return grid, [describe(a, [m, k]), describe(b, [n, k]), describe(c, [m, n]), 3], c


@gluon.jit
def produce(a_desc, b_desc, rings, barriers, row, column, tiles, STAGES: gl.constexpr):
    a_ring, b_ring = rings
    ready, free = barriers
    for tile in range(tiles):
        mbarrier.wait(free.index(tile % STAGES), tile // STAGES & 1 ^ 1)
        load_pair(a_desc, b_desc, a_ring, b_ring, ready, row, column, tile, STAGES)


@gluon.jit
def consume(
    c_desc, rings, barriers, row, column, tiles, BITS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr
):
    a_ring, b_ring = rings
    ready, free = barriers
    M: gl.constexpr = c_desc.block_type.shape[0]
    N: gl.constexpr = c_desc.block_type.shape[1]
    acc = gl.full([M, N], 0.0, gl.float32, product_layout(N, BITS, num_warps))
    for tile in range(tiles):
        slot = tile % STAGES
        mbarrier.wait(ready.index(slot), tile // STAGES & 1)
        acc = warpgroup_mma(a_ring.index(slot), b_ring.index(slot).permute((1, 0)), acc)
        mbarrier.arrive(free.index(slot))
    store_tile(c_desc, acc, row, column)


@gluon.jit
def specialized_gemm_kernel(a_desc, b_desc, c_desc, STAGES: gl.constexpr, num_warps: gl.constexpr):
    """The same product, with a producer warp."""
    M: gl.constexpr = a_desc.block_type.shape[0]
    N: gl.constexpr = b_desc.block_type.shape[0]
    K: gl.constexpr = a_desc.block_type.shape[1]
    bits: gl.constexpr = a_desc.dtype.primitive_bitwidth
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, M, K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, N, K], b_desc.layout)
    rings = (a_ring, b_ring)
    ready = allocate_barriers(STAGES, 1)
    free = allocate_barriers(STAGES, 1)
    barriers = (ready, free)
    row = gl.program_id(0) * M
    column = gl.program_id(1) * N
    tiles = gl.cdiv(a_desc.shape[1], K)
    gl.warp_specialize(
        [
            (consume, (c_desc, rings, barriers, row, column, tiles, bits, STAGES, num_warps)),
            (produce, (a_desc, b_desc, rings, barriers, row, column, tiles, STAGES)),
        ],
        [1],
        [24],
    )

"""Rung 2: copies run ahead, into a ring of tiles for K and one for V, with an mbarrier per slot.

As soon as a product has read its slot, the copy of the tile STAGES further on is issued into the same slot. The wait
for it comes STAGES iterations later. Slot and phase follow from the tile's number: with 2 slots, tile 5 is the third in
slot 1, so its phase is 5 // 2 & 1 = 0.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from kernels.gluon_names import allocate_barriers, tma_load, tma_store
from kernels.hopper.tile import accumulator_layout, count_key_tiles, finish, mask_scores, softmax_step, store_lse


@gluon.jit
def load_tile(desc, batch, tile, column, ready, ring, STAGES: gl.constexpr):
    """Issues the copy of a tile, and does not wait for it."""
    BLOCK_N: gl.constexpr = desc.block_type.shape[1]
    slot = tile % STAGES
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma_load(desc, [batch, tile * BLOCK_N, column], ready.index(slot), ring.index(slot))


@gluon.jit
def forward(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, seqlen_q, seqlen_k, heads_per_kv, scale_log2,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. Descriptors see (batch, seqlen, heads · headdim); blocks (1, rows, headdim)."""
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    D: gl.constexpr = q_desc.block_type.shape[2]
    dtype: gl.constexpr = q_desc.dtype
    score_layout: gl.constexpr = accumulator_layout(BLOCK_N, num_warps)
    out_layout: gl.constexpr = accumulator_layout(D, num_warps)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    start_m = gl.program_id(0) * BLOCK_M
    head = gl.program_id(1)
    batch = gl.program_id(2)
    kv_column = head // heads_per_kv * D
    tiles = count_key_tiles(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)

    q_smem = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    # The one arrival of each phase is that of `expect`; the phase completes when the copy's bytes have landed.
    # No barrier guards the refill: a synchronous product has read its slot before the next copy into it is issued.
    q_ready = allocate_barriers(1, 1).index(0)  # guards q_smem: its copy's bytes complete it, all warps wait, once
    k_ready = allocate_barriers(STAGES, 1)  # guards a k_ring slot: its copy completes it, all warps wait before Q·Kᵀ
    v_ready = allocate_barriers(STAGES, 1)  # guards a v_ring slot: its copy completes it, all warps wait before P·V

    mbarrier.expect(q_ready, q_desc.block_type.nbytes)
    tma_load(q_desc, [batch, start_m, head * D], q_ready, q_smem)
    for tile in range(gl.minimum(tiles, STAGES)):
        load_tile(k_desc, batch, tile, kv_column, k_ready, k_ring, STAGES)
        load_tile(v_desc, batch, tile, kv_column, v_ready, v_ring, STAGES)

    m = gl.full([BLOCK_M], float("-inf"), gl.float32, row_layout)
    l = gl.full([BLOCK_M], 0.0, gl.float32, row_layout)
    acc = gl.full([BLOCK_M, D], 0.0, gl.float32, out_layout)
    empty = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, score_layout)
    q_tile = q_smem.reshape([BLOCK_M, D])
    mbarrier.wait(q_ready, 0)
    for tile in range(tiles):
        slot = tile % STAGES
        phase = tile // STAGES & 1
        k_tile = k_ring.index(slot).reshape([BLOCK_N, D])
        v_tile = v_ring.index(slot).reshape([BLOCK_N, D])
        mbarrier.wait(k_ready.index(slot), phase)
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), empty, use_acc=False)
        if tile + STAGES < tiles:
            load_tile(k_desc, batch, tile + STAGES, kv_column, k_ready, k_ring, STAGES)
        scores = mask_scores(scores, start_m, tile * BLOCK_N, seqlen_q, seqlen_k, CAUSAL)
        p, m, l, rescale = softmax_step(scores, m, l, scale_log2)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        mbarrier.wait(v_ready.index(slot), phase)
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_tile, acc)
        if tile + STAGES < tiles:
            load_tile(v_desc, batch, tile + STAGES, kv_column, v_ready, v_ring, STAGES)

    out, lse = finish(acc, m, l)
    store_lse(lse_ptr, lse, start_m, head, batch, seqlen_q)
    q_tile.store(out.to(dtype))
    fence_async_shared()
    tma_store(o_desc, [batch, start_m, head * D], q_smem)
    tma.store_wait(0)

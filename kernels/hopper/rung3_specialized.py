"""Rung 3: warp specialisation. One warp issues the copies, two warpgroups multiply, mbarriers synchronise the slots.

The producer needs few registers, the consumers many: on entry all warps have the same number, then the producer
releases all but 24 and the consumers take the rest (`setmaxnreg`). A slot has two barriers: "ready", completed by the
bytes of a copy, and "free", completed by the consumers after they have read it. The producer waits for the "free" of
the round before; before the first round that phase counts as complete, so the wait does not block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from kernels.gluon_names import allocate_barriers, tma_load, tma_store
from kernels.hopper.tile import accumulator_layout, count_key_tiles, finish, mask_scores, softmax_step, store_lse

PRODUCER_WARPS = gl.constexpr(1)
PRODUCER_REGISTERS = gl.constexpr(24)  # the minimum of setmaxnreg


@gluon.jit
def load_tile(desc, batch, tile, column, ready, free, ring, STAGES: gl.constexpr):
    """Waits until the slot is free, issues the copy of the tile, and does not wait for it."""
    BLOCK_N: gl.constexpr = desc.block_type.shape[1]
    slot = tile % STAGES
    phase = tile // STAGES & 1
    mbarrier.wait(free.index(slot), phase ^ 1)
    mbarrier.expect(ready.index(slot), desc.block_type.nbytes)
    tma_load(desc, [batch, tile * BLOCK_N, column], ready.index(slot), ring.index(slot))


@gluon.jit
def produce(descs, rings, barriers, place, tiles, STAGES: gl.constexpr):
    """The producer: Q once, then K and V tile by tile, as slots become free."""
    q_desc, k_desc, v_desc, o_desc = descs
    q_smem, k_ring, v_ring = rings
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    batch, start_m, column, kv_column = place
    mbarrier.expect(q_ready, q_desc.block_type.nbytes)
    tma_load(q_desc, [batch, start_m, column], q_ready, q_smem)
    for tile in range(tiles):
        load_tile(k_desc, batch, tile, kv_column, k_ready, k_free, k_ring, STAGES)
        load_tile(v_desc, batch, tile, kv_column, v_ready, v_free, v_ring, STAGES)


@gluon.jit
def consume(
    descs, rings, barriers, place, tiles, lse_ptr, head, seqlen_q, seqlen_k, scale_log2,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The consumers: rung 2's loop without its copies; they arrive at a slot's "free" when they have read it."""
    q_desc, k_desc, v_desc, o_desc = descs
    q_smem, k_ring, v_ring = rings
    q_ready, k_ready, k_free, v_ready, v_free = barriers
    batch, start_m, column, kv_column = place
    BLOCK_M: gl.constexpr = q_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    D: gl.constexpr = q_desc.block_type.shape[2]
    dtype: gl.constexpr = q_desc.dtype
    score_layout: gl.constexpr = accumulator_layout(BLOCK_N, num_warps)
    out_layout: gl.constexpr = accumulator_layout(D, num_warps)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

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
        mbarrier.arrive(k_free.index(slot))
        scores = mask_scores(scores, start_m, tile * BLOCK_N, seqlen_q, seqlen_k, CAUSAL)
        p, m, l, rescale = softmax_step(scores, m, l, scale_log2)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        mbarrier.wait(v_ready.index(slot), phase)
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_tile, acc)
        mbarrier.arrive(v_free.index(slot))

    out, lse = finish(acc, m, l)
    store_lse(lse_ptr, lse, start_m, head, batch, seqlen_q)
    q_tile.store(out.to(dtype))
    fence_async_shared()
    tma_store(o_desc, [batch, start_m, column], q_smem)
    tma.store_wait(0)


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

    start_m = gl.program_id(0) * BLOCK_M
    head = gl.program_id(1)
    batch = gl.program_id(2)
    tiles = count_key_tiles(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)

    q_smem = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    # The one arrival of a "ready" is that of the producer's `expect`; it completes when the copy's bytes have landed.
    q_ready = allocate_barriers(1, 1).index(0)  # guards q_smem: the copy's bytes complete it, the consumers wait
    k_ready = allocate_barriers(STAGES, 1)  # guards reads of a k_ring slot: the copy completes it, the consumers wait
    k_free = allocate_barriers(STAGES, 1)  # guards its refill: the consumers arrive after Q·Kᵀ, the producer waits
    v_ready = allocate_barriers(STAGES, 1)  # guards reads of a v_ring slot: the copy completes it, the consumers wait
    v_free = allocate_barriers(STAGES, 1)  # guards its refill: the consumers arrive after P·V, the producer waits

    descs = (q_desc, k_desc, v_desc, o_desc)
    rings = (q_smem, k_ring, v_ring)
    barriers = (q_ready, k_ready, k_free, v_ready, v_free)
    place = (batch, start_m, head * D, head // heads_per_kv * D)
    gl.warp_specialize(
        [
            (
                consume,
                (descs, rings, barriers, place, tiles, lse_ptr, head, seqlen_q, seqlen_k, scale_log2,
                 CAUSAL, STAGES, num_warps),
            ),
            (produce, (descs, rings, barriers, place, tiles, STAGES)),
        ],
        [PRODUCER_WARPS],
        [PRODUCER_REGISTERS],
    )  # fmt: skip

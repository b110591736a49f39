"""Rung 1: TMA copies tiles into shared memory and WGMMA multiplies them, one after the other.

FlashAttention-2's loop with Hopper's two engines. The warps wait for every copy and every product right after its
issue: nothing overlaps yet. It shows what the engines need: a descriptor of the tensor, an mbarrier that counts the
bytes of a copy, a fence between what threads write and what an engine reads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from kernels.gluon_names import allocate_barriers, tma_load, tma_store
from kernels.hopper.tile import accumulator_layout, count_key_tiles, finish, mask_scores, softmax_step, store_lse


@gluon.jit
def load_and_wait(desc, coordinates, barrier, phase, smem):
    """Copies a tile and waits for all its bytes. The barrier's phase flips 0, 1, 0, … with each copy that lands."""
    mbarrier.expect(barrier, desc.block_type.nbytes)
    tma_load(desc, coordinates, barrier, smem)
    mbarrier.wait(barrier, phase)


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
    kv_column = head // heads_per_kv * D  # head 5 of 8 with 2 K/V heads: 5 // 4 = 1, columns D to 2D - 1

    q_smem = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, v_desc.block_type.shape, v_desc.layout)
    q_tile = q_smem.reshape([BLOCK_M, D])
    k_tile = k_smem.reshape([BLOCK_N, D]).permute((1, 0))  # Kᵀ is a view of K, not a copy
    v_tile = v_smem.reshape([BLOCK_N, D])
    # The one arrival of each phase is that of `expect`; the phase completes when the copy's bytes have landed.
    q_ready = allocate_barriers(1, 1).index(0)  # guards q_smem: its copy's bytes complete it, all warps wait, once
    k_ready = allocate_barriers(1, 1).index(0)  # guards k_smem: its copy completes it, all warps wait before Q·Kᵀ
    v_ready = allocate_barriers(1, 1).index(0)  # guards v_smem: its copy completes it, all warps wait before P·V

    load_and_wait(q_desc, [batch, start_m, head * D], q_ready, 0, q_smem)
    m = gl.full([BLOCK_M], float("-inf"), gl.float32, row_layout)
    l = gl.full([BLOCK_M], 0.0, gl.float32, row_layout)
    acc = gl.full([BLOCK_M, D], 0.0, gl.float32, out_layout)
    empty = gl.full([BLOCK_M, BLOCK_N], 0.0, gl.float32, score_layout)
    for tile in range(count_key_tiles(start_m, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)):
        start_n = tile * BLOCK_N
        phase = tile & 1
        load_and_wait(k_desc, [batch, start_n, kv_column], k_ready, phase, k_smem)
        scores = warpgroup_mma(q_tile, k_tile, empty, use_acc=False)
        scores = mask_scores(scores, start_m, start_n, seqlen_q, seqlen_k, CAUSAL)
        p, m, l, rescale = softmax_step(scores, m, l, scale_log2)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, out_layout))[:, None]
        load_and_wait(v_desc, [batch, start_n, kv_column], v_ready, phase, v_smem)
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_tile, acc)

    out, lse = finish(acc, m, l)
    store_lse(lse_ptr, lse, start_m, head, batch, seqlen_q)
    q_tile.store(out.to(dtype))  # Q is not read any more: its tile takes the output
    fence_async_shared()  # threads wrote it, the copy engine reads it
    tma_store(o_desc, [batch, start_m, head * D], q_smem)  # TMA leaves out rows past the end
    tma.store_wait(0)

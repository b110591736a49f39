"""The backward: δ of each row first, then dK and dV for each tile of keys, then dQ for each tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.runtime import prepare
from kernels.tiles import LOG2E, VARYING, cap, load_tile, locate, sequence, store_tile, tiles_seen, visible

prepare()  # before the first @triton.jit: see kernels/tiles.py


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    out, grad_out, grad_lse, delta,
    out_strides, grad_out_strides, row_batch, row_head,
    cu_seqlens_q, seqlen_q,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, line 4: δ = Σ dO·O of each row. The gradient of lse is subtracted here: d lse / d score is p."""
    start, head, batch = tl.program_id(0) * BLOCK_Q, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_q, seqlen_q = sequence(cu_seqlens_q, batch, seqlen_q)
    if start >= seqlen_q:
        return
    out = locate(out, out_strides, batch, first_q + start, head)
    grad_out = locate(grad_out, grad_out_strides, batch, first_q + start, head)
    row = batch * row_batch + head * row_head + first_q + start

    n_rows = seqlen_q - start
    out_tile = load_tile(out, out_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, False)
    grad_tile = load_tile(grad_out, grad_out_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, False)
    rows = tl.arange(0, BLOCK_Q)
    ACC: tl.constexpr = delta.dtype.element_ty
    through_lse = tl.load(grad_lse + row + rows, mask=rows < n_rows, other=0.0)
    result = tl.sum(out_tile.to(ACC) * grad_tile.to(ACC), 1) - through_lse
    tl.store(delta + row + rows, result, mask=rows < n_rows)


@triton.jit(do_not_specialize=VARYING)
def backward_kv_kernel(
    q, k, v, grad_out, lse, delta,
    q_strides, k_strides, v_strides, grad_out_strides, row_batch, row_head,
    grad_k, grad_v, grad_strides,
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k,
    scale, softcap, left, right,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 2 for one tile of keys: one walk over the queries that see it, in every query head that shares it."""
    start, head_k, batch = tl.program_id(0) * BLOCK_K, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_q, seqlen_q = sequence(cu_seqlens_q, batch, seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k, batch, seqlen_k)
    if start >= seqlen_k:
        return
    n_rows = seqlen_k - start
    k = locate(k, k_strides, batch, first_k + start, head_k)
    v = locate(v, v_strides, batch, first_k + start, head_k)
    k_tile = load_tile(k, k_strides[1], n_rows, BLOCK_K, HEADDIM, BLOCK_D, False)
    v_tile = load_tile(v, v_strides[1], n_rows, BLOCK_K, HEADDIM, BLOCK_D, False)
    ACC: tl.constexpr = delta.dtype.element_ty
    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_D), ACC)

    # Queries from j - shift - right to j - shift + left see key j: the forward's mask, solved for the query.
    shift = seqlen_k - seqlen_q
    stop = tl.minimum(start + BLOCK_K, seqlen_k) - shift
    bounds = tiles_seen(start - shift, stop, right, left, seqlen_q, BLOCK_Q, RIGHT, LEFT)
    columns = start + tl.arange(0, BLOCK_K)
    scoring = (scale, softcap, left, right)
    head = head_k * GROUP  # the first query head that shares this KV head
    q = locate(q, q_strides, batch, first_q, head)
    grad_out = locate(grad_out, grad_out_strides, batch, first_q, head)
    row = batch * row_batch + head * row_head + first_q
    queries = (q, grad_out, lse + row, delta + row, q_strides, grad_out_strides, row_head, seqlen_q, shift)
    if RIGHT:
        dk, dv = backward_kv_inner(
            dk, dv, k_tile, v_tile, columns, queries, scoring, bounds[0], bounds[1],
            GROUP, HEADDIM, BLOCK_D, BLOCK_Q, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
    dk, dv = backward_kv_inner(
        dk, dv, k_tile, v_tile, columns, queries, scoring, bounds[1], bounds[2],
        GROUP, HEADDIM, BLOCK_D, BLOCK_Q, LEFT, RIGHT, SOFTCAP, False,
    )  # fmt: skip
    dk, dv = backward_kv_inner(
        dk, dv, k_tile, v_tile, columns, queries, scoring, tl.maximum(bounds[1], bounds[2]), bounds[3],
        GROUP, HEADDIM, BLOCK_D, BLOCK_Q, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip
    grad_k = locate(grad_k, grad_strides, batch, first_k + start, head_k)
    grad_v = locate(grad_v, grad_strides, batch, first_k + start, head_k)
    store_tile(grad_k, dk * scale, grad_strides[1], n_rows, BLOCK_K, HEADDIM, BLOCK_D)
    store_tile(grad_v, dv, grad_strides[1], n_rows, BLOCK_K, HEADDIM, BLOCK_D)


@triton.jit
def backward_kv_inner(
    dk, dv, k_tile, v_tile, columns, queries, scoring, first, stop,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The inner loop over tiles of queries, head after head: dK += dSᵀ·Q, dV += Pᵀ·dO. Scores are Sᵀ: a key is a row.

    One loop over the tiles of all heads that share the keys: nested in a loop over the heads, dK and dV would spill.
    """
    q, grad_out, lse, delta, q_strides, grad_out_strides, row_head, seqlen_q, shift = queries
    scale, softcap, left, right = scoring
    tiles = tl.cdiv(tl.maximum(0, stop - first), BLOCK_Q)
    for i in range(GROUP * tiles):
        member = i // tiles if GROUP > 1 else 0
        start = tl.multiple_of(first + (i - member * tiles) * BLOCK_Q, BLOCK_Q)
        n_rows = seqlen_q - start
        q_rows = locate(q, q_strides, 0, start, member)
        q_tile = load_tile(q_rows, q_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, not MASKED)
        do_rows = locate(grad_out, grad_out_strides, 0, start, member)
        do_tile = load_tile(do_rows, grad_out_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, not MASKED)
        rows = tl.arange(0, BLOCK_Q)
        row = tl.cast(member, tl.int64) * row_head + start
        lse_row = tl.load(lse + row + rows, mask=rows < n_rows, other=0.0)
        delta_row = tl.load(delta + row + rows, mask=rows < n_rows, other=0.0)
        raw = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee", out_dtype=dk.dtype)
        scores, unit = cap(raw, scale, softcap, SOFTCAP)
        p = tl.exp2(scores * unit - lse_row[None, :] * LOG2E)
        if MASKED:
            seen = visible((start + rows + shift)[None, :], columns[:, None], left, right, LEFT, RIGHT)
            p = tl.where(seen & (rows < n_rows)[None, :], p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee", out_dtype=dv.dtype)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee", out_dtype=dk.dtype)
        ds = p * (dp - delta_row[None, :])
        if SOFTCAP:
            ds *= cap_slope(scores, softcap)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee", out_dtype=dk.dtype)
    return dk, dv


@triton.jit(do_not_specialize=VARYING)
def backward_q_kernel(
    q, k, v, grad_out, lse, delta,
    q_strides, k_strides, v_strides, grad_out_strides, row_batch, row_head,
    grad_q, grad_strides,
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k,
    scale, softcap, left, right,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 2 for one tile of queries: the forward's walk over keys again, for dQ."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first_q, seqlen_q = sequence(cu_seqlens_q, batch, seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k, batch, seqlen_k)
    start = tile * BLOCK_Q
    if start >= seqlen_q:
        return
    q = locate(q, q_strides, batch, first_q + start, head)
    grad_out = locate(grad_out, grad_out_strides, batch, first_q + start, head)
    row = batch * row_batch + head * row_head + first_q + start
    k = locate(k, k_strides, batch, first_k, head // GROUP)
    v = locate(v, v_strides, batch, first_k, head // GROUP)

    n_rows = seqlen_q - start
    rows = tl.arange(0, BLOCK_Q)
    q_tile = load_tile(q, q_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, False)
    do_tile = load_tile(grad_out, grad_out_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, False)
    lse_row = tl.load(lse + row + rows, mask=rows < n_rows, other=0.0)
    delta_row = tl.load(delta + row + rows, mask=rows < n_rows, other=0.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), delta.dtype.element_ty)

    shift = seqlen_k - seqlen_q
    stop = tl.minimum(start + BLOCK_Q, seqlen_q) + shift
    bounds = tiles_seen(start + shift, stop, left, right, seqlen_k, BLOCK_K, LEFT, RIGHT)
    queries = (q_tile, do_tile, lse_row, delta_row, start + shift + rows)
    keys = (k, v, k_strides[1], v_strides[1], seqlen_k)
    scoring = (scale, softcap, left, right)
    if LEFT:
        dq = backward_q_inner(
            dq, queries, keys, scoring, bounds[0], bounds[1],
            HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
    dq = backward_q_inner(
        dq, queries, keys, scoring, bounds[1], bounds[2],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, False,
    )  # fmt: skip
    dq = backward_q_inner(
        dq, queries, keys, scoring, tl.maximum(bounds[1], bounds[2]), bounds[3],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip
    grad_q = locate(grad_q, grad_strides, batch, first_q + start, head)
    store_tile(grad_q, dq * scale, grad_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D)


@triton.jit
def backward_q_inner(
    dq, queries, keys, scoring, first, stop,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The inner loop over tiles of keys: dQ += dS·K."""
    q_tile, do_tile, lse_row, delta_row, positions = queries
    k, v, k_stride, v_stride, seqlen_k = keys
    scale, softcap, left, right = scoring
    for start in range(first, stop, BLOCK_K):
        start = tl.multiple_of(start, BLOCK_K)
        far = tl.cast(start, tl.int64)
        k_tile = load_tile(k + far * k_stride, k_stride, seqlen_k - start, BLOCK_K, HEADDIM, BLOCK_D, not MASKED)
        v_tile = load_tile(v + far * v_stride, v_stride, seqlen_k - start, BLOCK_K, HEADDIM, BLOCK_D, not MASKED)
        raw = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee", out_dtype=dq.dtype)
        scores, unit = cap(raw, scale, softcap, SOFTCAP)
        p = tl.exp2(scores * unit - lse_row[:, None] * LOG2E)
        if MASKED:
            columns = start + tl.arange(0, BLOCK_K)
            seen = visible(positions[:, None], columns[None, :], left, right, LEFT, RIGHT)
            p = tl.where(seen & (columns < seqlen_k)[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee", out_dtype=dq.dtype)
        ds = p * (dp - delta_row[:, None])
        if SOFTCAP:
            ds *= cap_slope(scores, softcap)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee", out_dtype=dq.dtype)
    return dq


@triton.jit
def cap_slope(scores, softcap):
    """The derivative of the soft cap: tanh' = 1 - tanh²."""
    return 1 - (scores / softcap) * (scores / softcap)

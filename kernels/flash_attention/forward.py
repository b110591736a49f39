"""The forward: `forward_kernel`, and `forward_inner`, its loop over tiles of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.runtime import prepare
from kernels.tiles import (
    LN2,
    VARYING,
    cap,
    load_rows,
    locate,
    place,
    sequence,
    softmax_step,
    store_tile,
    tiles_seen,
    visible,
)

prepare()  # before the first @triton.jit: see kernels/tiles.py


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse,  # pointers; with TMA q, k and v are descriptors
    q_strides, k_strides, v_strides, out_strides,  # of each: (batch, row, head), and None for a descriptor
    row_batch, row_head,  # strides of lse, whose rows are contiguous
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k,  # the first two are None for a padded batch
    scale, softcap, left, right,  # a causal mask is right = 0
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr,  # GROUP query heads share a KV head
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Algorithm 1 for one tile of queries: one walk over the tiles of keys that it sees."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the last tiles see the most keys, so they start first
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # 64 bits: offsets pass 2³¹
    first_q, seqlen_q = sequence(cu_seqlens_q, batch, seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k, batch, seqlen_k)
    start = tile * BLOCK_Q
    if start >= seqlen_q:  # a short sequence of a ragged batch
        return
    RAGGED: tl.constexpr = cu_seqlens_q is not None
    batch = 0 if RAGGED else batch  # a ragged batch lies in one: first_q and first_k locate its sequences
    q_begin = place(q, q_strides, batch, first_q + start, head, TMA)
    k_begin = place(k, k_strides, batch, first_k, head // GROUP, TMA)  # K and V are read in place, never repeated
    v_begin = place(v, v_strides, batch, first_k, head // GROUP, TMA)
    out = locate(out, out_strides, batch, first_q + start, head)
    lse += batch * row_batch + head * row_head + first_q + start

    n_rows = seqlen_q - start
    q_tile = load_rows(q, q_begin, 0, n_rows, BLOCK_Q, HEADDIM, BLOCK_D, False, TMA)
    positions = start + seqlen_k - seqlen_q + tl.arange(0, BLOCK_Q)  # the last query has the last key's position
    ACC: tl.constexpr = tl.float64 if q_tile.dtype == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    m = tl.full((BLOCK_Q,), float("-inf"), ACC)  # largest score, times log2 e: the softmax is in base 2
    l = tl.zeros((BLOCK_Q,), ACC)

    stop = tl.minimum(start + BLOCK_Q, seqlen_q) + seqlen_k - seqlen_q
    bounds = tiles_seen(start + seqlen_k - seqlen_q, stop, left, right, seqlen_k, BLOCK_K, LEFT, RIGHT)
    keys = (k, v, k_begin, v_begin, seqlen_k)
    FOREIGN: tl.constexpr = TMA and RAGGED  # a tile's rows behind the end are the next sequence's
    scoring = (scale, softcap, left, right)
    if LEFT:  # tiles at the window's left end
        acc, m, l = forward_inner(
            acc, m, l, q_tile, positions, keys, scoring, bounds[0], bounds[1],
            HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True, TMA, FOREIGN,
        )  # fmt: skip
    acc, m, l = forward_inner(  # tiles that every query sees whole: no mask, no tail
        acc, m, l, q_tile, positions, keys, scoring, bounds[1], bounds[2],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, False, TMA, FOREIGN,
    )  # fmt: skip
    acc, m, l = forward_inner(  # the diagonal, and the tail
        acc, m, l, q_tile, positions, keys, scoring, tl.maximum(bounds[1], bounds[2]), bounds[3],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True, TMA, FOREIGN,
    )  # fmt: skip

    empty = l == 0  # a row that sees no key: out 0, lse -inf
    acc = acc / tl.where(empty, 1, l)[:, None]
    store_tile(out, acc, out_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D)
    rows = tl.arange(0, BLOCK_Q)
    natural = (m + tl.log2(tl.where(empty, 1, l))) * LN2
    tl.store(lse + rows, tl.where(empty, float("-inf"), natural), mask=rows < n_rows)


@triton.jit
def forward_inner(
    acc, m, l, q_tile, positions, keys, scoring, first, stop,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, FOREIGN: tl.constexpr,
):  # fmt: skip
    """The inner loop: tiles of keys from `first` to `stop`, and the online softmax over them (lines 6 to 11)."""
    k, v, k_begin, v_begin, seqlen_k = keys
    scale, softcap, left, right = scoring
    for start in range(first, stop, BLOCK_K):
        start = tl.multiple_of(start, BLOCK_K)
        k_tile = load_rows(k, k_begin, start, seqlen_k, BLOCK_K, HEADDIM, BLOCK_D, not MASKED, TMA)
        # "ieee": the default for fp32 is TF32, with a mantissa of 10 bits. Half precision is not affected.
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee", out_dtype=acc.dtype)
        scores, unit = cap(scores, scale, softcap, SOFTCAP)
        if MASKED:
            columns = start + tl.arange(0, BLOCK_K)
            seen = visible(positions[:, None], columns[None, :], left, right, LEFT, RIGHT)
            scores = tl.where(seen & (columns < seqlen_k)[None, :], scores, float("-inf"))
        p, m, l, rescale = softmax_step(scores, m, l, unit, MASKED)
        v_tile = load_rows(v, v_begin, start, seqlen_k, BLOCK_K, HEADDIM, BLOCK_D, not MASKED, TMA)
        if MASKED and FOREIGN:  # their P is 0, but 0 · NaN is NaN
            v_tile = tl.where((start + tl.arange(0, BLOCK_K) < seqlen_k)[:, None], v_tile, 0)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee", out_dtype=acc.dtype)
    return acc, m, l

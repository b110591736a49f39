"""What every rung does with a tile in registers: the mask, the softmax step, the normalisation.

The rungs differ in how tiles come into shared memory and in their synchronisation; this arithmetic is the same in all.
Rows are queries; `m` is the largest score so far and `l` the sum, both of a row, as in FlashAttention-2's algorithm 1,
with 2 as the base of the powers: exp(x) is exp2(x · log2 e), and the factor is folded into the scale.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def accumulator_layout(columns, num_warps):
    """The layout of a WGMMA accumulator of `columns`: 16 rows per warp, 64 rows per warpgroup and instruction."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, columns, 16])


@gluon.jit
def count_key_tiles(start_m, seqlen_q, seqlen_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """The number of tiles of keys that the tile of queries at `start_m` sees.

    Causal (bottom-right aligned), the last query of the tile sees the most keys: with 3 queries and 9 keys in tiles of
    4, query 2 sees keys 0 to 8, so 3 tiles.
    """
    stop = seqlen_k
    if CAUSAL:
        stop = gl.minimum(stop, gl.maximum(start_m + BLOCK_M + seqlen_k - seqlen_q, 0))
    return gl.cdiv(stop, BLOCK_N)


@gluon.jit
def mask_scores(scores, start_m, start_n, seqlen_q, seqlen_k, CAUSAL: gl.constexpr):
    """-inf where a key does not exist or, causal, lies after the query. A tile that all rows see whole is unchanged."""
    BLOCK_M: gl.constexpr = scores.shape[0]
    BLOCK_N: gl.constexpr = scores.shape[1]
    layout: gl.constexpr = scores.type.layout
    seen_by_all = seqlen_k
    if CAUSAL:
        seen_by_all = gl.minimum(seqlen_k, start_m + 1 + seqlen_k - seqlen_q)
    if start_n + BLOCK_N > seen_by_all:
        keys = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))[None, :]
        limit = gl.full([BLOCK_M, 1], seqlen_k, gl.int32, layout)
        if CAUSAL:
            queries = start_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))[:, None]
            limit = gl.minimum(limit, queries + 1 + seqlen_k - seqlen_q)
        scores = gl.where(keys < limit, scores, float("-inf"))
    return scores


@gluon.jit
def softmax_step(scores, m, l, scale_log2):
    """Algorithm 1, line 9: P without its normalisation, the new m and l, and the factor that rescales earlier sums."""
    m_new = gl.maximum(m, gl.max(scores, 1) * scale_log2)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row without a key so far: -inf - -inf would be NaN
    p = gl.exp2(scores * scale_log2 - shift[:, None])
    rescale = gl.exp2(m - shift)
    return p, m_new, l * rescale + gl.sum(p, 1), rescale


@gluon.jit
def finish(acc, m, l):
    """The output, fp32, and the log-sum-exp in natural log. A row that sees no key: 0 and -inf."""
    seen = l > 0
    out = acc / gl.convert_layout(gl.where(seen, l, 1.0), gl.SliceLayout(1, acc.type.layout))[:, None]
    lse = gl.where(seen, (m + gl.log2(gl.where(seen, l, 1.0))) * LN_2, float("-inf"))
    return out, lse


@gluon.jit
def store_lse(lse_ptr, lse, start_m, head, batch, seqlen_q):
    """Row i of head h of batch b lies at (b · nheads + h) · seqlen_q + i."""
    BLOCK_M: gl.constexpr = lse.shape[0]
    queries = start_m + gl.arange(0, BLOCK_M, lse.type.layout)
    row = (batch * gl.num_programs(1) + head).to(gl.int64) * seqlen_q
    gl.store(lse_ptr + row + queries, lse, mask=queries < seqlen_q)

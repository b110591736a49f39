"""What the Triton attention kernels share: where a tile lies, loads and stores, masks, the softmax step."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.runtime import prepare

# Before the first @triton.jit of the process: the decorator reads TRITON_INTERPRET, which `prepare` sets where there is
# no GPU. Every module with kernels calls it after its imports; only the first call does something.
prepare()

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · log2 e): a GPU has an instruction for exp2 only
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that Triton must not specialise on: it would compile again for the value 1 and for multiples of 16.
VARYING = ["seqlen_q", "seqlen_k", "left", "right", "row_batch", "row_head"]


@triton.jit
def sequence(cu_seqlens, batch, seqlen):
    """A sequence's first row and its length: from cu_seqlens in a ragged batch, else 0 and the common length."""
    if cu_seqlens is None:
        return 0, seqlen
    else:  # not left out: Triton also compiles what follows a constant `if` that returns
        first = tl.load(cu_seqlens + batch)
        return first.to(tl.int64), tl.load(cu_seqlens + batch + 1) - first


@triton.jit
def locate(pointer, strides, batch, row, head):
    """Where a head's row begins. A contiguous (2, 100, 8, 64) has strides (51200, 512, 64), so sequence 1, row 3,
    head 2 begins 1·51200 + 3·512 + 2·64 = 52864 elements after the pointer."""
    row, head = tl.cast(row, tl.int64), tl.cast(head, tl.int64)  # offsets may pass 2³¹
    return pointer + batch * strides[0] + row * strides[1] + head * strides[2]


@triton.jit
def load_tile(
    pointer, stride, n_rows, ROWS: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """A tile of rows that lie `stride` apart: with 512, element (3, 5) is 3·512 + 5 = 1541 after the pointer.

    Rows from n_rows on and dimensions from HEADDIM on are 0 and are not read: the memory there may hold NaN, or not be
    ours. A WHOLE tile has all its rows.
    """
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    if WHOLE and HEADDIM == BLOCK_D:
        return tl.load(pointer + rows * stride + dims)
    else:
        return tl.load(pointer + rows * stride + dims, mask=(rows < n_rows) & (dims < HEADDIM), other=0.0)


@triton.jit
def place(x, strides, batch, row, head, TMA: tl.constexpr):
    """Where a head's rows begin, as `load_rows` wants it: indices into a descriptor, else an address and the stride."""
    if TMA:
        return tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(row, tl.int32)
    else:
        return locate(x, strides, batch, row, head), strides[1]


@triton.jit
def load_rows(
    x, begin, first, n_rows,
    ROWS: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile whose rows are `first`, `first` + 1 … of the n_rows that begin at a `place`.

    By a descriptor (batch, nheads, seqlen, headdim) one instruction copies the tile, without an address in a register.
    It fills up with 0 behind the tensor's last row and dimension; but rows from n_rows on that the tensor has, those
    of the next sequence in a ragged batch, are read.
    """
    if TMA:
        batch, head, row = begin
        return x.load([batch, head, row + first, 0]).reshape(ROWS, BLOCK_D)
    else:
        pointer, stride = begin
        pointer += tl.cast(first, tl.int64) * stride
        return load_tile(pointer, stride, n_rows - first, ROWS, HEADDIM, BLOCK_D, WHOLE)


@triton.jit
def store_tile(pointer, tile, stride, n_rows, ROWS: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile's first n_rows rows and HEADDIM dimensions, in the pointer's dtype."""
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(pointer + rows * stride + dims, tile, mask=(rows < n_rows) & (dims < HEADDIM))


@triton.jit
def cap(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """The scores, soft-capped if SOFTCAP, and the factor that takes them to base 2."""
    if SOFTCAP:
        return softcap * tanh(scores * (scale / softcap)), LOG2E
    else:
        return scores, scale * LOG2E


@triton.jit
def tanh(x):
    """Triton has no tanh. Near 0, where 1 - exp would cancel, the first terms of the series."""
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    fall = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - fall) / (1 + fall)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def visible(position, column, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether a query at `position` sees the key at `column`: at most `left` before it, at most `right` after it."""
    seen = position == position
    if LEFT:
        seen &= column >= position - left
    if RIGHT:
        seen &= column <= position + right
    return seen


@triton.jit
def tiles_seen(first, stop, before, after, length, BLOCK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Which tiles the positions first … stop - 1 see of `length` others, `before` to the left, `after` to the right.

    Returns four bounds. Tiles from [0] to [1] are seen in part (the window's left end), tiles from [1] to [2] are seen
    whole by every position, tiles from there to [3] are seen in part or are not full. No other tile is visited.
    """
    begin, whole = 0, 0
    end, whole_stop = length, length
    if AFTER:
        end = tl.maximum(0, tl.minimum(length, stop + after))
        whole_stop = tl.maximum(0, tl.minimum(length, first + after + 1))
    if BEFORE:
        begin = tl.maximum(0, first - before) // BLOCK * BLOCK
        whole = tl.minimum(end, tl.cdiv(tl.maximum(0, stop - 1 - before), BLOCK) * BLOCK)
    return begin, whole, whole_stop // BLOCK * BLOCK, end


@triton.jit
def softmax_step(scores, m, l, unit, MASKED: tl.constexpr):
    """Algorithm 1, line 9, for one tile of scores. `unit` takes scores to base 2, in which m is kept.

    Returns P without its normalisation, the new m and l, and the factor that rescales what was summed before. Only a
    MASKED tile may leave a row without any key.
    """
    m_new = tl.maximum(m, tl.max(scores, 1) * unit)
    shift = tl.where(m_new == float("-inf"), 0, m_new) if MASKED else m_new  # -inf - -inf would be NaN
    p = tl.exp2(scores * unit - shift[:, None])
    rescale = tl.exp2(m - shift)
    return p, m_new, l * rescale + tl.sum(p, 1), rescale

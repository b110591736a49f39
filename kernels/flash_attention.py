"""FlashAttention-2 in Triton: forward and backward, for padded and ragged batches. Read it from `forward_kernel` down.

A program owns a tile of queries and walks over the tiles of keys that they see; the backward does that once more for
dQ, and with keys and queries exchanged for dK and dV. No program adds to what another one writes, so there are no
atomics, and the same call gives the same bits every time.

Source: FlashAttention-2 (Dao, arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.runtime import prepare

MODE = prepare()

import triton  # noqa: E402 - only now does @triton.jit know where the kernels run
import triton.language as tl  # noqa: E402

from kernels import tuning  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEADDIM = 256
MAX_GRID = 65535  # programs along the second and third axis of a launch (CUDA), which heads and batch are

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · log2 e): a GPU has an instruction for exp2 only
LN2 = tl.constexpr(0.6931471805599453)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """Attention with flash-attn's signature, by the Triton kernel.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16 or fp32; headdim up to 256.
        k, v: (batch, seqlen_k, nheads_k, headdim); nheads a multiple of nheads_k (GQA, MQA).
        dropout_p, alibi_slopes: not supported: 0.0 and None only.
        softmax_scale: positive factor of the scores, 1/√headdim when left out.
        causal: query i sees the keys up to i + seqlen_k - seqlen_q (bottom-right aligned).
        window_size: (left, right) keys that a query sees beside its position, -1 for no limit.
        softcap: when positive, scores become softcap · tanh(score / softcap).
        deterministic: it always is.
        return_attn_probs: return (out, lse, None), as flash-attn does without dropout.

    Returns:
        out like q; lse (batch, nheads, seqlen_q), natural log, fp32, and **+inf** where a row sees no key, as
        flash-attn writes it (-inf everywhere else in this repository, where results are merged).

    Raises:
        ValueError, TypeError: where an argument is not supported or the tensors do not fit each other.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    out, lse = flash_attention(
        q, k, v, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap
    )
    return (out, _as_flash_attn(lse), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
):
    """`flash_attn_func` for a ragged batch: sequences of different lengths, one behind the other, without padding.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32; sequence i holds rows cu_seqlens[i] … cu_seqlens[i + 1] - 1.
        max_seqlen_q, max_seqlen_k: the longest sequence of each; an upper bound will do.
        block_table: not supported: None only.
        The others: as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`, lse being (nheads, total_q).

    Raises:
        ValueError, TypeError: as `flash_attn_func`.
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    ragged = Ragged(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = flash_attention(
        q, k, v, ragged, causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap
    )
    return (out, _as_flash_attn(lse), None) if return_attn_probs else out


def _refuse(**arguments) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value:
            raise ValueError(f"{name} is not supported by the Triton kernel: leave it out")


def _as_flash_attn(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, torch.inf)


class Ragged(NamedTuple):
    """Where the sequences of a ragged batch lie; see `flash_attn_varlen_func`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ragged: Ragged | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention by the Triton kernel, with the log-sum-exp of each row.

    Args:
        q, k, v: as in `flash_attn_func`, or with `ragged` as in `flash_attn_varlen_func`. The interpreter also takes
            float64, for checks.
        causal, softmax_scale, window_size, softcap: as in `flash_attn_func`.

    Returns:
        out like q; lse (batch, nheads, seqlen_q) or (nheads, total_q), natural log, fp32 (float64 for float64), -inf
        where a row sees no key. Both are differentiable (once).

    Raises:
        ValueError, TypeError: where the tensors do not fit each other or the kernel.
    """
    _check(q, k, v, ragged, window_size, softcap, softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = ragged or (None, None, q.shape[1], k.shape[1])
    # A window as long as the sequence is none; and the kernel adds it to positions, so that 2³¹ - 1 would overflow.
    left = -1 if window_size[0] >= lengths[3] else window_size[0]
    right = 0 if causal else -1 if window_size[1] >= lengths[2] else window_size[1]
    return torch.ops.kernels.flash_attention_forward(q, k, v, *lengths, scale, left, right, softcap)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ragged: Ragged | None,
    window_size: tuple[int, int],
    softcap: float,
    softmax_scale: float | None,
) -> None:
    layout = "(total, nheads, headdim)" if ragged else "(batch, seqlen, nheads, headdim)"
    allowed = (*DTYPES, torch.float64) if MODE.name == "interpreter" else DTYPES
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != (3 if ragged else 4):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, wants {layout}")
        if x.dtype not in allowed:
            raise TypeError(f"{name} is {x.dtype}, wants float16, bfloat16 or float32")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: they must agree")
        if x.shape[-1] != q.shape[-1] or (not ragged and x.shape[0] != q.shape[0]):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, q has {tuple(q.shape)}: batch and headdim must agree")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, k has {tuple(k.shape)}: they must agree")
    if not 1 <= q.shape[-1] <= MAX_HEADDIM:
        raise ValueError(f"q has headdim {q.shape[-1]}, wants 1 to {MAX_HEADDIM}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k has {k.shape[-2]} heads, not a divisor of q's {q.shape[-2]}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size is {window_size}, wants (left, right) with -1 for no limit")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}, wants a positive number, or 0 for none")
    if softmax_scale is not None and softmax_scale <= 0:  # the kernel takes the maximum first, and scales it then
        raise ValueError(f"softmax_scale is {softmax_scale}, wants a positive number")
    for name, cu_seqlens in zip(("cu_seqlens_q", "cu_seqlens_k"), ragged[:2] if ragged else (), strict=False):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device:
            raise ValueError(f"{name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, wants int32 (batch + 1,)")
    if ragged and len(ragged.cu_seqlens_q) != len(ragged.cu_seqlens_k):
        sizes = len(ragged.cu_seqlens_q), len(ragged.cu_seqlens_k)
        raise ValueError(f"cu_seqlens_q has {sizes[0]} entries, cu_seqlens_k {sizes[1]}: they must agree")
    batch = len(ragged.cu_seqlens_q) - 1 if ragged else q.shape[0]
    for what, number in (("batch", batch), ("heads", q.shape[-2])):
        if number > MAX_GRID:
            raise ValueError(f"q has {what} {number}, wants at most {MAX_GRID}: split the call")


@torch.library.custom_op("kernels::flash_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """An operator of torch's, so that torch.compile takes it as one piece and does not look into it."""
    q, k, v, narrow = _ready(q, k, v)
    out, lse = q.new_empty(q.shape), _empty_lse(q)
    call = Call(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap)
    with torch.cuda.device_of(q):  # Triton launches on the current device, which need not be the tensors'
        call.forward(q, k, v, out, lse)
    return out.to(narrow), lse


@_forward.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap):
    return q.new_empty(q.shape), _empty_lse(q)


@torch.library.custom_op("kernels::flash_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out, out, narrow = _ready(q, k, v, grad_out, out)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    call = Call(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap)
    with torch.cuda.device_of(q):
        call.backward(q, k, v, out, lse, grad_out, grad_lse.contiguous(), grad_q, grad_k, grad_v)
    return grad_q.to(narrow), grad_k.to(narrow), grad_v.to(narrow)


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx, inputs, output) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output)  # no probabilities: the backward computes them again


def _differentiate(ctx, grad_out, grad_lse):
    grads = torch.ops.kernels.flash_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, *(None for _ in ctx.rest)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _ready(*tensors: Tensor):
    """Tensors as the kernels take them, and the dtype of the results."""
    narrow = tensors[0].dtype
    if MODE.name == "interpreter" and narrow == torch.bfloat16:
        # The interpreter keeps bf16 as uint16, and tl.dot multiplies those integers: silently wrong by 1e8.
        tensors = tuple(x.float() for x in tensors)
    return *(x if x.stride(-1) == 1 else x.contiguous() for x in tensors), narrow


def _empty_lse(q: Tensor) -> Tensor:
    """(batch, nheads, seqlen_q), or (nheads, total_q) where q is ragged."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=dtype)


class Call:
    """What the kernels of one call share, and their launches: a program for each tile, head and sequence."""

    def __init__(self, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap):
        self.ragged = cu_seqlens_q is not None
        if self.ragged:  # the kernel reads them one behind the other
            cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        self.batch = len(cu_seqlens_q) - 1 if self.ragged else q.shape[0]
        self.nheads, self.nheads_k, self.headdim, self.dtype = q.shape[-2], k.shape[-2], q.shape[-1], q.dtype
        self.lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.mask = (scale, softcap, left, right)
        self.constants = constants(self.headdim, self.nheads // self.nheads_k, left >= 0, right >= 0, softcap > 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        sizes = self._sizes("forward")
        grid = (triton.cdiv(self.lengths[2], sizes["BLOCK_Q"]), self.nheads, self.batch)
        strides = (*map(self._strides, (q, k, v, out)), *self._row_strides(lse))
        forward_kernel[grid](q, k, v, out, lse, *strides, *self.lengths, *self.mask, **self.constants, **sizes)

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, grad_q, grad_k, grad_v) -> None:
        delta = torch.empty_like(lse)
        self._delta(out, grad_out, grad_lse, delta)
        tensors = (q, k, v, grad_out, lse, delta)
        strides = (*map(self._strides, (q, k, v, grad_out)), *self._row_strides(lse))

        sizes = self._sizes("backward_kv")
        grid = (triton.cdiv(self.lengths[3], sizes["BLOCK_K"]), self.nheads_k, self.batch)
        kv = (grad_k, grad_v, self._strides(grad_k))  # both are contiguous
        backward_kv_kernel[grid](*tensors, *strides, *kv, *self.lengths, *self.mask, **self.constants, **sizes)

        sizes = self._sizes("backward_q")
        grid = (triton.cdiv(self.lengths[2], sizes["BLOCK_Q"]), self.nheads, self.batch)
        outputs = (grad_q, self._strides(grad_q))
        backward_q_kernel[grid](*tensors, *strides, *outputs, *self.lengths, *self.mask, **self.constants, **sizes)

    def _delta(self, out: Tensor, grad_out: Tensor, grad_lse: Tensor, delta: Tensor) -> None:
        grid = (triton.cdiv(self.lengths[2], DELTA_ROWS), self.nheads, self.batch)
        strides = (*map(self._strides, (out, grad_out)), *self._row_strides(delta))
        sizes = {name: self.constants[name] for name in ("HEADDIM", "BLOCK_D")}
        delta_kernel[grid](
            out, grad_out, grad_lse, delta, *strides, self.lengths[0], self.lengths[2], BLOCK_Q=DELTA_ROWS, **sizes
        )

    def _sizes(self, kernel: str) -> dict[str, int]:
        return tuning.choice(kernel, self.headdim, self.dtype, self.constants["LEFT"]).keywords()

    def _strides(self, x: Tensor) -> tuple[int, int, int]:
        """From one sequence, row and head to the next, in elements; cu_seqlens leads to a ragged batch's sequences."""
        return (0 if self.ragged else x.stride(0), x.stride(-3), x.stride(-2))

    def _row_strides(self, x: Tensor) -> tuple[int, int]:
        """From one sequence and head to the next with one number a row: (batch, nheads, seqlen) or (nheads, total)."""
        return (0 if self.ragged else x.stride(0), x.stride(-2))


DELTA_ROWS = 256 if MODE.name == "interpreter" else 32


def constants(headdim: int, group: int, left: bool, right: bool, softcap: bool) -> dict:
    """What a kernel is compiled for: the flags leave out whole branches, so that no call pays for another's mask."""
    block_d = tuning.padded(headdim)
    return dict(GROUP=group, HEADDIM=headdim, BLOCK_D=block_d, LEFT=left, RIGHT=right, SOFTCAP=softcap)


# Arguments that Triton shall not look at: it would compile again for a length of 1, and for one that 16 divides.
VARYING = ["seqlen_q", "seqlen_k", "left", "right", "row_batch", "row_head"]


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q, k, v, out, lse,  # where the tensors lie
    q_strides, k_strides, v_strides, out_strides,  # of each: (batch, row, head)
    row_batch, row_head,  # the same of lse, whose rows follow each other
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k,  # the first two are None for a padded batch
    scale, softcap, left, right,  # a causal mask is right = 0
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr,  # GROUP query heads share a KV head
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Algorithm 1: one tile of queries, one walk over the tiles of keys that it sees."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the last tiles have most to do: first
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)  # 64 bits: offsets pass 2³¹
    first_q, seqlen_q = sequence(cu_seqlens_q, batch, seqlen_q)
    first_k, seqlen_k = sequence(cu_seqlens_k, batch, seqlen_k)
    start = tile * BLOCK_Q
    if start >= seqlen_q:  # a short sequence of a ragged batch
        return
    q = locate(q, q_strides, batch, first_q + start, head)
    k = locate(k, k_strides, batch, first_k, head // GROUP)  # K and V are read where they lie, never repeated
    v = locate(v, v_strides, batch, first_k, head // GROUP)
    out = locate(out, out_strides, batch, first_q + start, head)
    lse += batch * row_batch + head * row_head + first_q + start

    n_rows = seqlen_q - start
    q_tile = load_tile(q, q_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D, False)
    positions = start + seqlen_k - seqlen_q + tl.arange(0, BLOCK_Q)  # the last query stands at the last key
    ACC: tl.constexpr = tl.float64 if q_tile.dtype == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    m = tl.full((BLOCK_Q,), float("-inf"), ACC)  # largest score, times log2 e: the softmax is in base 2
    l = tl.zeros((BLOCK_Q,), ACC)

    stop = tl.minimum(start + BLOCK_Q, seqlen_q) + seqlen_k - seqlen_q
    bounds = tiles_seen(start + seqlen_k - seqlen_q, stop, left, right, seqlen_k, BLOCK_K, LEFT, RIGHT)
    keys = (k, v, k_strides[1], v_strides[1], seqlen_k)
    numbers = (scale, softcap, left, right)
    if LEFT:  # tiles that the window cuts at its left end
        acc, m, l = take_in(
            acc, m, l, q_tile, positions, keys, numbers, bounds[0], bounds[1],
            HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
    acc, m, l = take_in(  # tiles that every query sees whole: no mask, no tail
        acc, m, l, q_tile, positions, keys, numbers, bounds[1], bounds[2],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, False,
    )  # fmt: skip
    acc, m, l = take_in(  # the diagonal, and the tail
        acc, m, l, q_tile, positions, keys, numbers, tl.maximum(bounds[1], bounds[2]), bounds[3],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip

    empty = l == 0  # a row that sees no key: out 0, lse -inf
    acc = acc / tl.where(empty, 1, l)[:, None]
    store_tile(out, acc, out_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D)
    rows = tl.arange(0, BLOCK_Q)
    natural = (m + tl.log2(tl.where(empty, 1, l))) * LN2
    tl.store(lse + rows, tl.where(empty, float("-inf"), natural), mask=rows < n_rows)


@triton.jit
def take_in(
    acc, m, l, q_tile, positions, keys, numbers, first, stop,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The inner loop: tiles of keys from `first` to `stop`, and the online softmax over them (lines 6 to 11)."""
    k, v, k_stride, v_stride, seqlen_k = keys
    for start in range(first, stop, BLOCK_K):
        start = tl.multiple_of(start, BLOCK_K)
        far = tl.cast(start, tl.int64)
        k_tile = load_tile(k + far * k_stride, k_stride, seqlen_k - start, BLOCK_K, HEADDIM, BLOCK_D, not MASKED)
        # "ieee": for fp32 the default is TF32, with 10 bits after the point; half precision is not touched by it.
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee", out_dtype=acc.dtype)
        scores, unit = cap(scores, numbers, SOFTCAP)
        if MASKED:
            columns = start + tl.arange(0, BLOCK_K)
            seen = visible(positions[:, None], columns[None, :], numbers, LEFT, RIGHT)
            scores = tl.where(seen & (columns < seqlen_k)[None, :], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * unit)
        shift = tl.where(m_new == float("-inf"), 0, m_new) if MASKED else m_new  # -inf - -inf would be NaN
        p = tl.exp2(scores * unit - shift[:, None])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(p, 1)
        v_tile = load_tile(v + far * v_stride, v_stride, seqlen_k - start, BLOCK_K, HEADDIM, BLOCK_D, not MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee", out_dtype=acc.dtype)
        m = m_new
    return acc, m, l


@triton.jit
def sequence(cu_seqlens, batch, seqlen):
    """A sequence's first row and its length: of a ragged batch from cu_seqlens, else 0 and the common length."""
    if cu_seqlens is None:
        return 0, seqlen
    else:  # Triton compiles what stands behind a constant `if`, also behind its return
        first = tl.load(cu_seqlens + batch)
        return first.to(tl.int64), tl.load(cu_seqlens + batch + 1) - first


@triton.jit
def locate(pointer, strides, batch, row, head):
    """Where a head's row begins. (2, 100, 8, 64) in one piece has strides (51200, 512, 64), so sequence 1, row 3,
    head 2 begins 1·51200 + 3·512 + 2·64 = 52864 elements after the pointer."""
    row, head = tl.cast(row, tl.int64), tl.cast(head, tl.int64)  # offsets may pass 2³¹
    return pointer + batch * strides[0] + row * strides[1] + head * strides[2]


@triton.jit
def load_tile(
    pointer, stride, n_rows, ROWS: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr
):
    """A tile of rows that lie `stride` apart: with 512, element (3, 5) is 3·512 + 5 = 1541 after the pointer.

    Rows from n_rows on and dimensions from HEADDIM on are 0 and not read: there may be NaN, or nothing. A WHOLE tile
    has all its rows.
    """
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    if WHOLE and HEADDIM == BLOCK_D:
        return tl.load(pointer + rows * stride + dims)
    else:
        return tl.load(pointer + rows * stride + dims, mask=(rows < n_rows) & (dims < HEADDIM), other=0.0)


@triton.jit
def store_tile(pointer, tile, stride, n_rows, ROWS: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows, dims = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tile = tile.to(pointer.dtype.element_ty)
    tl.store(pointer + rows * stride + dims, tile, mask=(rows < n_rows) & (dims < HEADDIM))


@triton.jit
def cap(scores, numbers, SOFTCAP: tl.constexpr):
    """The scores, soft-capped where asked for, and the factor that takes them to base 2."""
    scale, softcap, left, right = numbers
    if SOFTCAP:
        return softcap * tanh(scores * (scale / softcap)), LOG2E
    else:
        return scores, scale * LOG2E


@triton.jit
def tanh(x):
    """Triton has none of its own. Near 0, where 1 - exp would cancel, the first terms of the series."""
    square = x * x
    near = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    fall = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1 - fall) / (1 + fall)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def visible(position, column, numbers, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether a query at this position sees this key: at most `left` before it, at most `right` after it."""
    scale, softcap, left, right = numbers
    seen = position == position
    if LEFT:
        seen &= column >= position - left
    if RIGHT:
        seen &= column <= position + right
    return seen


@triton.jit
def tiles_seen(first, stop, before, after, length, BLOCK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """What the positions first … stop - 1 see of `length` others, `before` to the left and `after` to the right.

    Returns four bounds: from [0] to [1] tiles of which some see only a part, from [1] to [2] tiles that all of them
    see whole, from there to [3] tiles that are seen in part or not full. Tiles outside are not visited.
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


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    out, grad_out, grad_lse, delta,
    out_strides, grad_out_strides, row_batch, row_head,
    cu_seqlens_q, seqlen_q,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Algorithm 2, line 4: δ = Σ dO·O of each row. The gradient of lse goes in here: d lse / d score is p itself."""
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
    """Algorithm 2 for one tile of keys: a walk over the queries that see it, of every head that shares it."""
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

    # Key j is seen by the queries from j - shift - right to j - shift + left: the mask read from the other side.
    shift = seqlen_k - seqlen_q
    stop = tl.minimum(start + BLOCK_K, seqlen_k) - shift
    bounds = tiles_seen(start - shift, stop, right, left, seqlen_q, BLOCK_Q, RIGHT, LEFT)
    columns = start + tl.arange(0, BLOCK_K)
    numbers = (scale, softcap, left, right)
    head = head_k * GROUP  # the first of the query heads that share this one
    q = locate(q, q_strides, batch, first_q, head)
    grad_out = locate(grad_out, grad_out_strides, batch, first_q, head)
    row = batch * row_batch + head * row_head + first_q
    queries = (q, grad_out, lse + row, delta + row, q_strides, grad_out_strides, row_head, seqlen_q, shift)
    if RIGHT:
        dk, dv = take_in_queries(
            dk, dv, k_tile, v_tile, columns, queries, numbers, bounds[0], bounds[1],
            GROUP, HEADDIM, BLOCK_D, BLOCK_Q, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
    dk, dv = take_in_queries(
        dk, dv, k_tile, v_tile, columns, queries, numbers, bounds[1], bounds[2],
        GROUP, HEADDIM, BLOCK_D, BLOCK_Q, LEFT, RIGHT, SOFTCAP, False,
    )  # fmt: skip
    dk, dv = take_in_queries(
        dk, dv, k_tile, v_tile, columns, queries, numbers, tl.maximum(bounds[1], bounds[2]), bounds[3],
        GROUP, HEADDIM, BLOCK_D, BLOCK_Q, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip
    grad_k = locate(grad_k, grad_strides, batch, first_k + start, head_k)
    grad_v = locate(grad_v, grad_strides, batch, first_k + start, head_k)
    store_tile(grad_k, dk * scale, grad_strides[1], n_rows, BLOCK_K, HEADDIM, BLOCK_D)
    store_tile(grad_v, dv, grad_strides[1], n_rows, BLOCK_K, HEADDIM, BLOCK_D)


@triton.jit
def take_in_queries(
    dk, dv, k_tile, v_tile, columns, queries, numbers, first, stop,
    GROUP: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of queries, head after head, and what they add to dK and dV. Everything is transposed: a key is a row.

    One loop over the tiles of all heads that share the keys: with one over the heads around it, dK and dV would spill.
    """
    q, grad_out, lse, delta, q_strides, grad_out_strides, row_head, seqlen_q, shift = queries
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
        scores, unit = cap(raw, numbers, SOFTCAP)
        p = tl.exp2(scores * unit - lse_row[None, :] * LOG2E)
        if MASKED:
            seen = visible((start + rows + shift)[None, :], columns[:, None], numbers, LEFT, RIGHT)
            p = tl.where(seen & (rows < n_rows)[None, :], p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee", out_dtype=dv.dtype)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee", out_dtype=dk.dtype)
        ds = p * (dp - delta_row[None, :])
        if SOFTCAP:
            ds *= slope(scores, numbers)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee", out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def slope(scores, numbers):
    """The derivative of the soft cap: tanh' = 1 - tanh²."""
    scale, softcap, left, right = numbers
    return 1 - (scores / softcap) * (scores / softcap)


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
    """Algorithm 2 for one tile of queries: the forward's walk once more, and dQ out of it."""
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
    numbers = (scale, softcap, left, right)
    if LEFT:
        dq = take_in_keys(
            dq, queries, keys, numbers, bounds[0], bounds[1],
            HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True,
        )  # fmt: skip
    dq = take_in_keys(
        dq, queries, keys, numbers, bounds[1], bounds[2],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, False,
    )  # fmt: skip
    dq = take_in_keys(
        dq, queries, keys, numbers, tl.maximum(bounds[1], bounds[2]), bounds[3],
        HEADDIM, BLOCK_D, BLOCK_K, LEFT, RIGHT, SOFTCAP, True,
    )  # fmt: skip
    grad_q = locate(grad_q, grad_strides, batch, first_q + start, head)
    store_tile(grad_q, dq * scale, grad_strides[1], n_rows, BLOCK_Q, HEADDIM, BLOCK_D)


@triton.jit
def take_in_keys(
    dq, queries, keys, numbers, first, stop,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    q_tile, do_tile, lse_row, delta_row, positions = queries
    k, v, k_stride, v_stride, seqlen_k = keys
    for start in range(first, stop, BLOCK_K):
        start = tl.multiple_of(start, BLOCK_K)
        far = tl.cast(start, tl.int64)
        k_tile = load_tile(k + far * k_stride, k_stride, seqlen_k - start, BLOCK_K, HEADDIM, BLOCK_D, not MASKED)
        v_tile = load_tile(v + far * v_stride, v_stride, seqlen_k - start, BLOCK_K, HEADDIM, BLOCK_D, not MASKED)
        raw = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee", out_dtype=dq.dtype)
        scores, unit = cap(raw, numbers, SOFTCAP)
        p = tl.exp2(scores * unit - lse_row[:, None] * LOG2E)
        if MASKED:
            columns = start + tl.arange(0, BLOCK_K)
            seen = visible(positions[:, None], columns[None, :], numbers, LEFT, RIGHT)
            p = tl.where(seen & (columns < seqlen_k)[None, :], p, 0.0)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee", out_dtype=dq.dtype)
        ds = p * (dp - delta_row[:, None])
        if SOFTCAP:
            ds *= slope(scores, numbers)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee", out_dtype=dq.dtype)
    return dq

"""From tensors to kernel launches: the checked entry, the torch operators with their autograd, a launch a kernel."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels import tuning
from kernels.derivatives import has_tangent, in_torch_func
from kernels.flash_attention.backward import backward_kv_kernel, backward_q_kernel, delta_kernel
from kernels.flash_attention.forward import forward_kernel
from kernels.runtime import prepare

MODE = prepare()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEADDIM = 256
MAX_GRID = 65535  # programs along the second and third axis of a launch (CUDA), which are heads and batch
ONE_BACKWARD = "the kernels have one backward and nothing else, attention in PyTorch has all (backend='tiled', 'naive')"
DELTA_ROWS = 256 if MODE.name == "interpreter" else 32  # a program of delta_kernel


class Ragged(NamedTuple):
    """A ragged batch: sequences of different lengths, one behind the other, without padding.

    Args:
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32; sequence i holds rows cu_seqlens[i] … cu_seqlens[i + 1] - 1.
        max_seqlen_q, max_seqlen_k: the longest sequence of each, or an upper bound.
    """

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
    """Attention by the Triton kernels, with the log-sum-exp of each row.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16 or fp32; headdim up to 256. The interpreter also takes
            float64, for checks.
        k, v: (batch, seqlen_k, nheads_k, headdim); nheads a multiple of nheads_k (GQA, MQA).
        ragged: with it q is (total_q, nheads, headdim), k and v are (total_k, nheads_k, headdim).
        causal: query i sees the keys up to i + seqlen_k - seqlen_q (bottom-right aligned).
        softmax_scale: positive factor of the scores, 1/√headdim when left out.
        window_size: (left, right) keys that a query sees beside its position, -1 for no limit.
        softcap: when positive, scores become softcap · tanh(score / softcap).

    Returns:
        out like q; lse (batch, nheads, seqlen_q) or (nheads, total_q), natural log, fp32 (float64 for float64), -inf
        where a row sees no key. Both are differentiable (once).

    Raises:
        ValueError, TypeError: where the tensors do not fit each other or the kernel.
    """
    _check(q, k, v, ragged, window_size, softcap, softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = ragged or (None, None, q.shape[1], k.shape[1])
    # A window as long as the sequence hides nothing. The kernel adds it to positions, where 2³¹ - 1 would overflow.
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
    if softmax_scale is not None and not softmax_scale > 0:  # the kernel takes the maximum before it scales
        raise ValueError(f"softmax_scale is {softmax_scale}, wants a positive number")
    for name, cu_seqlens in zip(("cu_seqlens_q", "cu_seqlens_k"), ragged[:2] if ragged else (), strict=False):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device:
            raise ValueError(f"{name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, wants int32 (batch + 1,)")
    if ragged and not (q.is_cuda or torch.compiler.is_compiling()):  # a GPU's numbers are not waited for
        _check_bounds("q", q, ragged.cu_seqlens_q.tolist(), ragged.max_seqlen_q)
        _check_bounds("k", k, ragged.cu_seqlens_k.tolist(), ragged.max_seqlen_k)
    if ragged and len(ragged.cu_seqlens_q) != len(ragged.cu_seqlens_k):
        sizes = len(ragged.cu_seqlens_q), len(ragged.cu_seqlens_k)
        raise ValueError(f"cu_seqlens_q has {sizes[0]} entries, cu_seqlens_k {sizes[1]}: they must agree")
    batch = len(ragged.cu_seqlens_q) - 1 if ragged else q.shape[0]
    for what, number in (("batch", batch), ("heads", q.shape[-2])):
        if number > MAX_GRID:
            raise ValueError(f"q has {what} {number}, wants at most {MAX_GRID}: split the call")
    if has_tangent(q, k, v) or in_torch_func(q, k, v):
        raise ValueError(f"q, k or v is differentiated in forward mode or by torch.func: {ONE_BACKWARD}")


def _check_bounds(of: str, x: Tensor, bounds: list[int], max_seqlen: int) -> None:
    """The interpreter reads real memory: outside of a tensor, that ends the process."""
    if not bounds or bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens_{of} is {bounds}, wants to rise from 0 to the {len(x)} rows of {of}")
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen_{of} is {max_seqlen}, and a sequence has {longest} rows")


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
    """A torch operator: torch.compile puts it into its graph as one node and does not trace into it."""
    q, k, v, narrow = _ready(q, k, v)
    out, lse = q.new_empty(q.shape), _empty_lse(q)
    call = Call(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap)
    with torch.cuda.device_of(q):  # Triton launches on the current device, which may not be that of the tensors
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
    ctx.save_for_backward(q, k, v, *output)  # no probabilities: the backward recomputes them


def _differentiate(ctx, grad_out, grad_lse):
    grads = torch.ops.kernels.flash_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *grads, *(None for _ in ctx.rest)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _refuse_second_derivative(ctx, *grads):
    raise NotImplementedError(f"a gradient of the Triton kernels is differentiated: {ONE_BACKWARD}")


_backward.register_autograd(_refuse_second_derivative)


def _ready(*tensors: Tensor):
    """Tensors in the dtype and strides that the kernels take, and the dtype of the results."""
    narrow = tensors[0].dtype
    if MODE.name == "interpreter" and narrow == torch.bfloat16:
        # The interpreter stores bf16 as uint16, and tl.dot multiplies those integers: wrong by 1e8, without an error.
        tensors = tuple(x.float() for x in tensors)
    return *(x if x.stride(-1) == 1 else x.contiguous() for x in tensors), narrow


def _empty_lse(q: Tensor) -> Tensor:
    """(batch, nheads, seqlen_q), or (nheads, total_q) where q is ragged."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=dtype)


class Call:
    """The arguments that the kernels of one call share, and the launches: a program per tile, head and sequence."""

    def __init__(self, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap):
        self.ragged = cu_seqlens_q is not None
        if self.ragged:  # the kernel reads consecutive entries
            cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        self.batch = len(cu_seqlens_q) - 1 if self.ragged else q.shape[0]
        self.nheads, self.nheads_k, self.headdim, self.dtype = q.shape[-2], k.shape[-2], q.shape[-1], q.dtype
        self.lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        self.scoring = (scale, softcap, left, right)
        self.constants = constants(self.headdim, self.nheads // self.nheads_k, left >= 0, right >= 0, softcap > 0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Launches the forward, which fills out and lse."""
        sizes = self._sizes("forward")
        grid = (triton.cdiv(self.lengths[2], sizes["BLOCK_Q"]), self.nheads, self.batch)
        strides = (*map(self._strides, (q, k, v, out)), *self._row_strides(lse))
        forward_kernel[grid](q, k, v, out, lse, *strides, *self.lengths, *self.scoring, **self.constants, **sizes)

    def backward(self, q, k, v, out, lse, grad_out, grad_lse, grad_q, grad_k, grad_v) -> None:
        """Launches δ, then dK and dV, then dQ, which fill the three gradients."""
        delta = torch.empty_like(lse)
        self._delta(out, grad_out, grad_lse, delta)
        tensors = (q, k, v, grad_out, lse, delta)
        strides = (*map(self._strides, (q, k, v, grad_out)), *self._row_strides(lse))

        sizes = self._sizes("backward_kv")
        grid = (triton.cdiv(self.lengths[3], sizes["BLOCK_K"]), self.nheads_k, self.batch)
        kv = (grad_k, grad_v, self._strides(grad_k))  # both are contiguous
        backward_kv_kernel[grid](*tensors, *strides, *kv, *self.lengths, *self.scoring, **self.constants, **sizes)

        sizes = self._sizes("backward_q")
        grid = (triton.cdiv(self.lengths[2], sizes["BLOCK_Q"]), self.nheads, self.batch)
        outputs = (grad_q, self._strides(grad_q))
        backward_q_kernel[grid](*tensors, *strides, *outputs, *self.lengths, *self.scoring, **self.constants, **sizes)

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
        """(batch, row, head), in elements; 0 for the batch where cu_seqlens locates the sequences."""
        return (0 if self.ragged else x.stride(0), x.stride(-3), x.stride(-2))

    def _row_strides(self, x: Tensor) -> tuple[int, int]:
        """(batch, head) of lse or delta, which are (batch, nheads, seqlen) or (nheads, total)."""
        return (0 if self.ragged else x.stride(0), x.stride(-2))


def constants(headdim: int, group: int, left: bool, right: bool, softcap: bool) -> dict:
    """What a kernel is compiled for. A flag that is False leaves its branch out of the compiled kernel."""
    block_d = tuning.padded(headdim)
    return dict(GROUP=group, HEADDIM=headdim, BLOCK_D=block_d, LEFT=left, RIGHT=right, SOFTCAP=softcap)

"""From tensors to kernel launches: the checked entry, and the torch operators with their autograd."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.derivatives import has_tangent, in_torch_func
from kernels.flash_attention.call import Call
from kernels.runtime import prepare

MODE = prepare()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEADDIM = 256
MAX_GRID = 65535  # programs along the second and third axis of a launch (CUDA), which are heads and batch
ONE_BACKWARD = "the kernels have one backward and nothing else, attention in PyTorch has all (backend='tiled', 'naive')"


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
    call = (*lengths, scale, left, right, softcap)
    if torch.compiler.is_compiling() or _wants_derivative(q, k, v):
        return torch.ops.kernels.flash_attention_forward.default(q, k, v, *call)
    return _below_autograd(torch.ops.kernels.flash_attention_forward.default, q, k, v, *call)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ragged: Ragged | None,
    window_size: tuple[int, int],
    softcap: float,
    softmax_scale: float | None,
) -> None:
    ndim = 3 if ragged else 4
    shape, shape_k, dtype = q.shape, k.shape, q.dtype
    allowed = (*DTYPES, torch.float64) if MODE.name == "interpreter" else DTYPES
    alike = dtype == k.dtype == v.dtype and q.device == k.device == v.device and shape_k == v.shape
    alike = alike and len(shape) == ndim == len(shape_k) and shape[-1] == shape_k[-1]
    if not alike or dtype not in allowed or (not ragged and shape[0] != shape_k[0]):
        _say_what_differs(q, k, v, ndim, allowed)
    if not 1 <= shape[-1] <= MAX_HEADDIM:
        raise ValueError(f"q has headdim {shape[-1]}, wants 1 to {MAX_HEADDIM}")
    if shape_k[-2] == 0 or shape[-2] % shape_k[-2]:
        raise ValueError(f"k has {shape_k[-2]} heads, not a divisor of q's {shape[-2]}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size is {window_size}, wants (left, right) with -1 for no limit")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}, wants a positive number, or 0 for none")
    if softmax_scale is not None and not softmax_scale > 0:  # the kernel takes the maximum before it scales
        raise ValueError(f"softmax_scale is {softmax_scale}, wants a positive number")
    if ragged:
        _check_cu_seqlens(q, k, ragged)
    batch = len(ragged.cu_seqlens_q) - 1 if ragged else shape[0]
    if batch > MAX_GRID or shape[-2] > MAX_GRID:
        what, number = ("batch", batch) if batch > MAX_GRID else ("heads", shape[-2])
        raise ValueError(f"q has {what} {number}, wants at most {MAX_GRID}: split the call")
    if has_tangent(q, k, v) or in_torch_func(q, k, v):
        raise ValueError(f"q, k or v is differentiated in forward mode or by torch.func: {ONE_BACKWARD}")


def _say_what_differs(q: Tensor, k: Tensor, v: Tensor, ndim: int, allowed: tuple[torch.dtype, ...]) -> None:
    layout = "(total, nheads, headdim)" if ndim == 3 else "(batch, seqlen, nheads, headdim)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != ndim:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, wants {layout}")
        if x.dtype not in allowed:
            raise TypeError(f"{name} is {x.dtype}, wants float16, bfloat16 or float32")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: they must agree")
        if x.shape[-1] != q.shape[-1] or (ndim == 4 and x.shape[0] != q.shape[0]):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, q has {tuple(q.shape)}: batch and headdim must agree")
    raise ValueError(f"v has shape {tuple(v.shape)}, k has {tuple(k.shape)}: they must agree")


def _check_cu_seqlens(q: Tensor, k: Tensor, ragged: Ragged) -> None:
    for name, cu_seqlens in zip(("cu_seqlens_q", "cu_seqlens_k"), ragged[:2], strict=True):
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != q.device:
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
            raise ValueError(f"{name} is {got}, wants int32 (batch + 1,) on {q.device}")
    if len(ragged.cu_seqlens_q) != len(ragged.cu_seqlens_k):
        sizes = len(ragged.cu_seqlens_q), len(ragged.cu_seqlens_k)
        raise ValueError(f"cu_seqlens_q has {sizes[0]} entries, cu_seqlens_k {sizes[1]}: they must agree")
    if not (q.is_cuda or torch.compiler.is_compiling()):  # a GPU's numbers are not waited for
        _check_bounds("q", q, ragged.cu_seqlens_q.tolist(), ragged.max_seqlen_q)
        _check_bounds("k", k, ragged.cu_seqlens_k.tolist(), ragged.max_seqlen_k)


def _check_bounds(of: str, x: Tensor, bounds: list[int], max_seqlen: int) -> None:
    """The interpreter reads real memory: outside of a tensor, that ends the process."""
    if not bounds or bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens_{of} is {bounds}, wants to rise from 0 to the {len(x)} rows of {of}")
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen_{of} is {max_seqlen}, and a sequence has {longest} rows")


# The operators. torch.compile puts each into its graph as one node and does not trace into it.
# `torch.library.custom_op` would do the same, and take longer on the host than all the rest of a call.
_CALL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float scale, SymInt left, SymInt right, float softcap"
)
torch.library.define(
    "kernels::flash_attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "kernels::flash_attention_backward",
    "(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(q: Tensor, k: Tensor, v: Tensor, *call) -> tuple[Tensor, Tensor]:
    q, k, v, narrow = _ready(q, k, v)
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
    with _device_of(q):
        Call(q, k, *call).forward(q, k, v, out, lse)
    return out if out.dtype == narrow else out.to(narrow), lse


@torch.library.register_fake("kernels::flash_attention_forward")
def _(q, k, v, *_):
    return q.new_empty(q.shape), _empty_lse(q)


def _backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *call
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad_out, out, narrow = _ready(q, k, v, grad_out, out)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    with _device_of(q):
        Call(q, k, *call).backward(q, k, v, out, lse, grad_out, grad_lse.contiguous(), grad_q, grad_k, grad_v)
    return grad_q.to(narrow), grad_k.to(narrow), grad_v.to(narrow)


@torch.library.register_fake("kernels::flash_attention_backward")
def _(grad_out, grad_lse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _forward_with_autograd(q, k, v, *call):
    if _wants_derivative(q, k, v):
        return _Forward.apply(q, k, v, *call)
    return _below_autograd(torch.ops.kernels.flash_attention_forward.default, q, k, v, *call)


def _backward_with_autograd(*arguments):
    if _wants_derivative(*arguments[:7]):
        return _Backward.apply(*arguments)
    return _below_autograd(torch.ops.kernels.flash_attention_backward.default, *arguments)


def _wants_derivative(*tensors: Tensor) -> bool:
    """A forward derivative counts: `apply` refuses it, and without `apply` it would be 0."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])


def _below_autograd(operator, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *call):
        out, lse = _below_autograd(torch.ops.kernels.flash_attention_forward.default, q, k, v, *call)
        ctx.save_for_backward(q, k, v, out, lse)  # no probabilities: the backward recomputes them
        ctx.call = call
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        grads = torch.ops.kernels.flash_attention_backward.default(grad_out, grad_lse, *ctx.saved_tensors, *ctx.call)
        return *grads, *(None for _ in ctx.call)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(f"the operator has no forward derivative: {ONE_BACKWARD}")


class _Backward(torch.autograd.Function):
    """The backward, which has no derivative of its own."""

    @staticmethod
    def forward(ctx, *arguments):
        return _below_autograd(torch.ops.kernels.flash_attention_backward.default, *arguments)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"a gradient of the Triton kernels is differentiated: {ONE_BACKWARD}")


torch.library.impl("kernels::flash_attention_forward", "default", _forward)
torch.library.impl("kernels::flash_attention_forward", "Autograd", _forward_with_autograd)
torch.library.impl("kernels::flash_attention_backward", "default", _backward)
torch.library.impl("kernels::flash_attention_backward", "Autograd", _backward_with_autograd)


def _device_of(x: Tensor):
    """Triton launches on the current device, which may not be that of the tensors."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _ready(*tensors: Tensor):
    """Tensors in the dtype and strides that the kernels take, and the dtype of the results."""
    narrow = tensors[0].dtype
    if MODE.name == "interpreter" and narrow == torch.bfloat16:
        # The interpreter stores bf16 as uint16, and tl.dot multiplies those integers: wrong by 1e8, without an error.
        tensors = tuple([x.float() for x in tensors])
    return *[x if x.stride(-1) == 1 else x.contiguous() for x in tensors], narrow


def _empty_lse(q: Tensor) -> Tensor:
    """(batch, nheads, seqlen_q), or (nheads, total_q) where q is ragged."""
    *batch, seqlen, nheads, _ = q.shape
    return q.new_empty((*batch, nheads, seqlen), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)

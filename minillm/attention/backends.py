"""One signature, many back ends: this file alone decides which implementation runs, and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime import prepare
from minillm.attention.inputs import check_inputs
from minillm.attention.masks import Visibility
from minillm.attention.naive import naive_attention
from minillm.attention.online import widen
from minillm.attention.tiled import flash_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
    block_q: int | None = None,
    block_k: int | None = None,
) -> Any:
    """Attention by the back end that was asked for, or by the first one that can do what was asked.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16, fp32 or float64.
        k, v: (batch, seqlen_k, nheads_k, headdim); nheads a multiple of nheads_k (GQA, MQA).
        causal: query i sees the keys up to i + seqlen_k - seqlen_q (bottom-right aligned).
        softmax_scale: factor of the scores, 1/√headdim when left out.
        window_size: (left, right) keys that a query sees beside its position, -1 for no limit.
        softcap: when positive, scores become softcap · tanh(score / softcap).
        return_lse: also return the log-sum-exp of each row's scores.
        backend: "naive", "tiled", "sdpa", "triton", or "auto"; `choose_backend` tells which one "auto" takes.
        block_q, block_k: tile sizes, for back ends that have tiles.

    Returns:
        out like q; with `return_lse`, (out, lse), lse (batch, nheads, seqlen_q) in natural log, fp32 (float64
        for float64 inputs). A row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: where the tensors are no attention input, the back end is unknown, or the back end
            that was asked for by name cannot do it.
    """
    check_inputs(q, k, v, window_size, softcap)
    options: dict[str, Any] = dict(
        causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, return_lse=return_lse
    )
    options |= {name: size for name, size in (("block_q", block_q), ("block_k", block_k)) if size is not None}
    choice = choose_backend(q, k, v, backend=backend, **options)
    return BACKENDS[choice.name].run(q, k, v, **options)


@dataclass(frozen=True)
class Choice:
    """A back end's name, why it was taken, and what kept those before it from being taken ({name: reason})."""

    name: str
    reason: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        others = "".join(f"; not {name}: it {objection}" for name, objection in self.passed_over.items())
        return f"{self.name}: {self.reason}{others}"


def choose_backend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **options) -> Choice:
    """Which back end `attention` runs for these arguments, and why.

    Args:
        q, k, v, backend, options: as given to `attention`.

    Raises:
        ValueError: where the back end is unknown, or asked for by name and cannot do it.
    """
    if backend == "auto":
        return _first_that_can(q, options, AUTO_ORDER)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, wants one of auto, {', '.join(BACKENDS)}")
    objection = BACKENDS[backend].objection(q, options)
    if objection:
        raise ValueError(f"backend {backend!r} {objection}: take backend='auto' or another one")
    return Choice(backend, "asked for by name", {})


def _first_that_can(q: Tensor, options: dict, order: tuple[str, ...]) -> Choice:
    passed_over: dict[str, str] = {}
    for name in order:
        objection = BACKENDS[name].objection(q, options)
        if objection is None:
            objection = BACKENDS[name].reluctance(q)
        if objection is None:
            return Choice(name, BACKENDS[name].strength, passed_over)
        passed_over[name] = objection
    raise AssertionError(f"the last of {order} does everything")


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor:
    """PyTorch's own fused attention, called with our layout and our mask.

    Its `is_causal=True` is aligned at the top left, so it serves only as many queries as keys; for all other
    masks the matrix is handed over.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    plain_causal = causal and seqlen_q == seqlen_k and window_size[0] < 0
    visibility = Visibility(seqlen_q, seqlen_k, causal, window_size)
    mask = None if plain_causal else visibility.mask(range(seqlen_q), range(seqlen_k), q.device)
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # (batch, nheads, seqlen, headdim)
    gqa = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=plain_causal, scale=softmax_scale, enable_gqa=gqa
    )
    return out.transpose(1, 2)


def _sdpa_objection(q: Tensor, options: dict) -> str | None:
    if options.get("softcap"):
        return "has no softcap"
    if options.get("return_lse"):
        return "does not return the lse"
    return _no_blocks(q, options)


def _no_blocks(q: Tensor, options: dict) -> str | None:
    return "has no block_q and block_k" if options.keys() & {"block_q", "block_k"} else None


def triton_attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options) -> Any:
    """The Triton kernel, on the GPU or in the interpreter; imported here, for it decides on import where it runs."""
    from kernels.flash_attention import flash_attention as kernel

    out, lse = kernel(q, k, v, **options)
    return (out, lse) if return_lse else out


def triton_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest: tuple[int, int],
    *,
    return_lse: bool = False,
    **options,
) -> Any:
    """A ragged batch in one launch; `longest` are the lengths of the longest sequences of q and of k."""
    from kernels.flash_attention import Ragged
    from kernels.flash_attention import flash_attention as kernel

    out, lse = kernel(q, k, v, Ragged(cu_seqlens_q, cu_seqlens_k, *longest), **options)
    return (out, lse) if return_lse else out


def _triton_objection(q: Tensor, options: dict) -> str | None:
    mode = prepare()
    if mode.name == "none":
        return f"cannot run: {mode.reason}"
    if q.is_cuda != (mode.name == "gpu"):
        return f"runs in the {mode.name} here ({mode.reason}), and q is on {q.device}"
    if q.dtype == torch.float64 and mode.name == "gpu":
        return "has no float64"
    if q.shape[-1] > 256:
        return f"has no headdim over 256, and q has {q.shape[-1]}"
    if (options.get("softmax_scale") or 1) < 0:
        return "wants a positive softmax_scale"
    return _no_blocks(q, options)


def _triton_reluctance(q: Tensor) -> str | None:
    mode = prepare()
    return None if mode.name == "gpu" else f"would run in the interpreter, slowly: {mode.reason}"


@dataclass(frozen=True)
class Backend:
    """An implementation, what speaks for it, and what it says against a call.

    Args:
        run: called like `attention`.
        strength: why "auto" takes it.
        objection: what it cannot do, None where it can; holds for a call by name, too.
        run_varlen: called like `attention_varlen`, and with the lengths of the longest sequences of q and of k, where
            it takes a ragged batch in one piece.
        reluctance: why "auto" should pass it over although it can.
    """

    run: Callable
    strength: str
    objection: Callable[[Tensor, dict], str | None]
    run_varlen: Callable | None = None
    reluctance: Callable[[Tensor], str | None] = lambda q: None


BACKENDS = {
    "naive": Backend(naive_attention, "the whole score matrix in memory", _no_blocks),
    "tiled": Backend(flash_attention, "tiles in PyTorch: does everything, in little memory", lambda q, options: None),
    "sdpa": Backend(sdpa_attention, "PyTorch's fused kernel, the fastest one here", _sdpa_objection),
    "triton": Backend(
        triton_attention,
        "the course's FlashAttention-2 kernel: does everything, on a GPU",
        _triton_objection,
        triton_attention_varlen,
        _triton_reluctance,
    ),
}
AUTO_ORDER = ("sdpa", "triton", "tiled")
AUTO_ORDER_VARLEN = ("triton", "sdpa", "tiled")  # one launch, where the others have one for each sequence


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool = False,
    backend: str = "auto",
    **options,
) -> Any:
    """Attention over a ragged batch: sequences of different lengths, one behind the other, without padding.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32; sequence i holds rows cu_seqlens[i] … cu_seqlens[i + 1] - 1.
        return_lse, backend, options: as in `attention`; on a GPU "auto" tries the Triton kernel first: one
            launch for all sequences.

    Returns:
        out like q; with `return_lse`, (out, lse), lse (nheads, total_q), natural log.

    Raises:
        ValueError: where the cu_seqlens do not fit each other or the tensors; and as `attention` does.

    Source:
        The interface of flash-attn's `flash_attn_varlen_func`, less its max_seqlen arguments.
    """
    bounds_q = _bounds("cu_seqlens_q", cu_seqlens_q, "q", q)
    bounds_k = _bounds("cu_seqlens_k", cu_seqlens_k, "k", k)
    if len(bounds_q) != len(bounds_k):
        raise ValueError(f"cu_seqlens_q has {len(bounds_q)} entries, cu_seqlens_k {len(bounds_k)}: they must agree")
    options["return_lse"] = return_lse
    if backend == "auto":
        name = _first_that_can(q[None], options, AUTO_ORDER_VARLEN).name
    else:
        name = choose_backend(q[None], k[None], v[None], backend=backend, **options).name
    if run := BACKENDS[name].run_varlen:
        longest = [max((end - start for start, end in _pairs(bounds)), default=0) for bounds in (bounds_q, bounds_k)]
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, **options)
    results = [
        attention(q[None, a:b], k[None, c:d], v[None, c:d], backend=backend, **options)
        for (a, b), (c, d) in zip(_pairs(bounds_q), _pairs(bounds_k), strict=True)
    ]
    if not return_lse:
        return torch.cat([q[:0], *(out[0] for out in results)])
    lse = torch.cat([widen(q[:0, :, 0].T), *(lse[0] for _, lse in results)], dim=1)  # (nheads, total_q)
    return torch.cat([q[:0], *(out[0] for out, _ in results)]), lse


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return list(zip(bounds, bounds[1:], strict=False))


def _bounds(name: str, cu_seqlens: Tensor, of: str, x: Tensor) -> list[int]:
    if x.ndim != 3:
        raise ValueError(f"{of} has shape {tuple(x.shape)}, wants (total, nheads, headdim)")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, wants int32 (batch + 1,)")
    bounds = cu_seqlens.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
        raise ValueError(f"{name} is {bounds}, wants to rise from 0 to the {len(x)} rows of {of}")
    return bounds

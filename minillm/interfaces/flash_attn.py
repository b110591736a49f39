"""flash-attn's signatures over `minillm.attention`: code written for flash-attn 2 runs with its import changed.

What these calls do not do (dropout, ALiBi, pages) is refused by name; for pages there is `minillm.attention.attend`.
The lse is always asked for, so "auto" takes the Triton kernel on a GPU and the tiled attention elsewhere: PyTorch's
fused kernel does not return it. Both give the same bits for the same call, so `deterministic` holds either way.

Source: flash-attention, flash_attn/flash_attn_interface.py.
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from minillm.attention import Keys, attend, attention


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
    *,
    backend: str = "auto",
) -> Any:
    """Attention with flash-attn's signature.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k, v: (batch, seqlen_k, nheads_k, headdim); nheads a multiple of nheads_k (GQA, MQA).
        dropout_p, alibi_slopes: not supported: 0.0 and None only.
        softmax_scale: factor of the scores, 1/√headdim when left out.
        causal: query i sees the keys up to i + seqlen_k - seqlen_q (bottom-right aligned).
        window_size: (left, right) keys that a query sees beside its position, -1 for no limit.
        softcap: when positive, scores become softcap · tanh(score / softcap).
        deterministic: accepted; the result always is.
        return_attn_probs: return (out, lse, None), as flash-attn does without dropout.
        backend: not flash-attn's: as in `minillm.attention.attention`.

    Returns:
        out like q; lse (batch, nheads, seqlen_q), natural log, fp32 (float64 for float64), and **+inf** where a row
        sees no key, as flash-attn writes it (-inf everywhere else in this repository, where results are merged).

    Raises:
        ValueError, TypeError: where an argument is not supported or the tensors do not fit each other.

    Example:
        >>> q, k, v = torch.randn(3, 1, 5, 2, 16)
        >>> flash_attn_func(q, k, v, causal=True).shape
        torch.Size([1, 5, 2, 16])
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes)
    options: dict[str, Any] = dict(
        causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, backend=backend
    )
    out, lse = attention(q, k, v, return_lse=True, **options)
    return _as_flash_attn(out, lse, return_attn_probs)


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
    *,
    backend: str = "auto",
) -> Any:
    """`flash_attn_func` for a ragged batch: sequences of different lengths, one behind the other, without padding.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32, rising from 0 to total; sequence i holds rows
            cu_seqlens[i] … cu_seqlens[i + 1] - 1.
        max_seqlen_q, max_seqlen_k: the longest sequence of each, or an upper bound.
        block_table: not supported: None only.
        The others: as in `flash_attn_func`.

    Returns:
        As `flash_attn_func`, lse being (nheads, total_q).

    Raises:
        ValueError, TypeError: as `flash_attn_func`; and where cu_seqlens do not rise from 0 to total, or a sequence is
            longer than max_seqlen says. On a GPU the call would have to wait to find out, and does so only with
            MINILLM_CHECK_ON_GPU=1 in the environment, or `minillm.attention.inputs.CHECK_ON_GPU = True`.

    Example:
        >>> q, k, v = torch.randn(3, 7, 2, 16)  # sequences of 3 and of 4 tokens
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4, causal=True).shape
        torch.Size([7, 2, 16])
    """
    _refuse(dropout_p=dropout_p, alibi_slopes=alibi_slopes, block_table=block_table)
    max_seqlen_q, max_seqlen_k = index(max_seqlen_q), index(max_seqlen_k)  # a Tensor of one number, too
    keys = Keys(k, v, cu_seqlens_k, max_seqlen=max_seqlen_k)
    options: dict[str, Any] = dict(
        causal=causal, softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, backend=backend
    )
    out, lse = attend(q, keys, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, return_lse=True, **options)
    return _as_flash_attn(out, lse, return_attn_probs)


def _refuse(**arguments) -> None:
    for name, value in arguments.items():
        if isinstance(value, Tensor) or value:
            raise ValueError(f"{name} is not supported: leave it out")


def _as_flash_attn(out: Tensor, lse: Tensor, return_attn_probs: bool) -> Any:
    return (out, lse.masked_fill(lse == -torch.inf, torch.inf), None) if return_attn_probs else out

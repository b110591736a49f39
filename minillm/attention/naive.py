"""Attention as the paper writes it: the whole score matrix, then softmax, then the values."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention.inputs import check_inputs, softmax_scale_of
from minillm.attention.masks import Visibility


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v with every intermediate matrix in memory: slow, plain, and the reference in float64.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16, bf16, fp32 or float64.
        k, v: (batch, seqlen_k, nheads_k, headdim); nheads a multiple of nheads_k (GQA, MQA).
        causal: query i sees the keys up to i + seqlen_k - seqlen_q (bottom-right aligned).
        softmax_scale: factor of the scores, 1/√headdim when left out.
        window_size: (left, right) keys that a query sees beside its position, -1 for no limit.
        softcap: when positive, scores become softcap · tanh(score / softcap).
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        out like q; with `return_lse`, (out, lse), lse (batch, nheads, seqlen_q) in natural log, fp32 (float64
        for float64 inputs). A row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError, TypeError: from `check_inputs`.

    Source:
        Vaswani et al., arXiv 1706.03762, equation 1.
    """
    check_inputs(q, k, v, window_size, softcap)
    group = q.shape[2] // k.shape[2]
    queries = q.transpose(1, 2)  # (batch, nheads, seqlen_q, headdim)
    keys = k.repeat_interleave(group, dim=2).transpose(1, 2)  # (batch, nheads, seqlen_k, headdim)
    values = v.repeat_interleave(group, dim=2).transpose(1, 2)

    # Scores in fp32 at least, as a tensor core sums them: in fp16, q · k overflows beyond 65504.
    scores = widen(queries) @ widen(keys).transpose(-1, -2) * softmax_scale_of(q, softmax_scale)  # (b, h, sq, sk)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    visibility = Visibility(q.shape[1], k.shape[1], causal, window_size)
    mask = visibility.mask(range(q.shape[1]), range(k.shape[1]), q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)

    probabilities, lse = safe_softmax(scores)
    out = (probabilities.to(v.dtype) @ values).transpose(1, 2)
    return (out, lse) if return_lse else out


def widen(x: Tensor) -> Tensor:
    """Half precision to fp32, as a tensor core accumulates; fp32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def safe_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis that survives any magnitude, an empty axis, and rows that are all -inf.

    Args:
        scores: (..., n), any float dtype; computed in fp32 at least.

    Returns:
        probabilities like scores (an all -inf row gives zeros), lse (...) in fp32 (float64 for float64).
    """
    wide = widen(scores)
    if wide.shape[-1] == 0:
        return scores, wide.new_full(wide.shape[:-1], -torch.inf)
    m = wide.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)  # -inf - -inf is NaN: guard the subtraction itself
    p = torch.exp(wide - m)
    l = p.sum(-1, keepdim=True)
    empty = l == 0
    l = l.masked_fill(empty, 1)
    lse = (m + l.log()).masked_fill(empty, -torch.inf)
    return (p / l).to(scores.dtype), lse.squeeze(-1)

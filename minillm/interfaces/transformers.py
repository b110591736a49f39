"""Our attention inside a model of Hugging Face's transformers: registered under a name, with the mask that it needs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minillm.attention.backends import attention, attention_varlen
from minillm.attention.keys import cu_seqlens_of


def register_with_transformers(name: str = "minillm", backend: str = "auto") -> str:
    """Makes our attention known to transformers; a model takes it with `attn_implementation=name`.

    The mask goes with it: without a registered mask, transformers hands an attention of its own no padding at all.

    Args:
        name: to register; registering again replaces it.
        backend: as in `attention`.

    Returns:
        The name.

    Raises:
        ImportError: where transformers is not installed.

    Source:
        transformers, `AttentionInterface` and `AttentionMaskInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, partial(_attend, backend=backend))
    AttentionMaskInterface.register(name, _padding_mask)
    return name


def _padding_mask(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Which keys are tokens and no padding: (batch, kv_length) bool, None where all are. Causality is ours to add."""
    if not allow_is_causal_skip or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            "this attention takes padding, causal and sliding-window masks only: not packed sequences, a mask of your "
            "own, or a static cache. Take attn_implementation='sdpa'"
        )
    if attention_mask is None or attention_mask[:, -kv_length:].all():
        return None
    return attention_mask[:, -kv_length:].bool()


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    *,
    backend: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as a transformers layer calls it.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key, value: (batch, nheads_k, seqlen_k, headdim), the cached ones included.
        attention_mask: from `_padding_mask`.
        scaling, dropout, sliding_window, softcap, is_causal, s_aux: the layer's; no dropout and no sinks.

    Returns:
        (batch, seqlen_q, nheads, headdim), 0 where a query is padding; and None for the probabilities.
    """
    for argument, given in (("dropout", dropout), ("s_aux", s_aux is not None)):
        if given:
            raise ValueError(f"{argument} is not supported by this attention: take attn_implementation='sdpa'")
    options: dict[str, Any] = dict(
        causal=module.is_causal if is_causal is None else is_causal,
        softmax_scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, -1),  # transformers counts the query's own
        softcap=softcap or 0.0,
        backend=backend,
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:
        return attention(q, k, v, **options), None
    return _without_padding(q, k, v, attention_mask, options), None


def _without_padding(q: Tensor, k: Tensor, v: Tensor, real_k: Tensor, options: dict[str, Any]) -> Tensor:
    """The tokens as a ragged batch: padding is neither read nor computed, and the causal mask aligns by itself."""
    real_q = real_k[:, -q.shape[1] :]  # the queries are the last positions
    out = torch.zeros_like(q)
    out[real_q] = attention_varlen(
        q[real_q], k[real_k], v[real_k], *(cu_seqlens_of(real.sum(1)) for real in (real_q, real_k)), **options
    )
    return out

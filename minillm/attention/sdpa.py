"""PyTorch's own fused attention, as a back end."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from kernels.derivatives import has_tangent
from minillm.attention.keys import Keys, Options, each_sequence
from minillm.attention.masks import Visibility


def why_not(q: Tensor, keys: Keys, options: Options) -> str | None:
    """What it cannot do of a call, None where it can."""
    if options.softcap:
        return "has no softcap"
    if options.return_lse:
        return "does not return the lse"
    if has_tangent(q, keys.k, keys.v):
        return "has no forward-mode derivative"
    return "has no block_q and block_k" if options.block_sizes else None


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    return_lse: bool,
) -> Tensor:
    """`F.scaled_dot_product_attention` with our layout and our mask; the arguments are those of `naive_attention`.

    Its `is_causal=True` is aligned at the top left, so that it serves for as many queries as keys only; every other
    mask is handed over as a matrix.
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


run = partial(each_sequence, sdpa_attention)

"""Softmax in one pass, and the merge of two partial results: the operation that the whole course is built on."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention.inputs import check_inputs, softmax_scale_of
from minillm.attention.masks import Visibility, tiles
from minillm.attention.naive import widen


class OnlineSoftmax:
    """softmax(scores) @ values for scores that arrive in pieces, never seen together.

    Args:
        rows: shape of the rows, (..., rows).
        headdim: size of a value.
        dtype, device: of the running sums, fp32 at least.

    Source:
        Milakov, Gimelshein, arXiv 1805.02867, algorithm 3; with the values as in FlashAttention-2,
        arXiv 2307.08691, algorithm 1, lines 9 and 10.
    """

    def __init__(self, rows: tuple[int, ...], headdim: int, dtype: torch.dtype, device=None):
        self.m = torch.full(rows, -torch.inf, dtype=dtype, device=device)  # largest score so far
        self.l = torch.zeros(rows, dtype=dtype, device=device)  # sum of exp(score - m)
        self.acc = torch.zeros(*rows, headdim, dtype=dtype, device=device)  # sum of exp(score - m) · value

    def update(self, scores: Tensor, values: Tensor) -> None:
        """Takes in a piece: scores (..., rows, n), -inf where masked, and values (..., n, headdim)."""
        m = torch.maximum(self.m, scores.detach().amax(-1))
        shift = m.masked_fill(m == -torch.inf, 0)  # -inf - -inf is NaN: guard the subtraction itself
        p = torch.exp(scores - shift[..., None])
        rescale = torch.exp(self.m - shift)  # what was summed under the old maximum, restated under the new
        self.l = rescale * self.l + p.sum(-1)
        self.acc = rescale[..., None] * self.acc + p @ values
        self.m = m

    def finish(self) -> tuple[Tensor, Tensor]:
        """Returns out (..., rows, headdim) and lse (..., rows); rows that saw nothing have 0 and -inf."""
        empty = self.l == 0
        l = self.l.masked_fill(empty, 1)
        return self.acc / l[..., None], (self.m + l.log()).masked_fill(empty, -torch.inf)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two sets of keys together, from the attention over each.

    Associative and commutative, with (0, -inf) as its neutral element: any cut of the keys, in any order,
    gives the same result.

    Args:
        out_a, out_b: (batch, seqlen, nheads, headdim), or ragged (total, nheads, headdim).
        lse_a, lse_b: (batch, nheads, seqlen) or (nheads, total), natural log; -inf for a row without keys
            (flash-attn 2 and FlashMLA write +inf there: convert it first).

    Returns:
        out like out_a, lse like lse_a.

    Raises:
        ValueError: where the shapes do not belong together.

    Source:
        FlashInfer (arXiv 2501.01005), section 2.2, the ⊕ of attention states; its LSE is base 2, ours base e.

    Example:
        >>> out, lse = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
        >>> merge_state(out, lse, 3 * out, lse)[0]  # equal weights: the mean
        tensor([[[[2., 2.]]]])
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        if out.shape != out_a.shape or lse.shape != lse_a.shape or lse.transpose(-1, -2).shape != out.shape[:-1]:
            raise ValueError(
                f"out_{name} has shape {tuple(out.shape)} and lse_{name} {tuple(lse.shape)}, "
                f"want (…, seqlen, nheads, headdim) and (…, nheads, seqlen), the same for a and b"
            )
    m = torch.maximum(lse_a, lse_b).detach()
    shift = m.masked_fill(m == -torch.inf, 0)
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    empty = total == 0
    total = total.masked_fill(empty, 1)

    def per_row(weight: Tensor) -> Tensor:
        return (weight / total).transpose(-1, -2)[..., None]  # (…, nheads, seqlen) -> (…, seqlen, nheads, 1)

    out = per_row(weight_a) * out_a + per_row(weight_b) * out_b
    return out.to(out_a.dtype), (shift + total.log()).masked_fill(empty, -torch.inf)


def online_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    block_k: int = 128,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in one pass over blocks of keys: all queries at once, `block_k` columns of scores at a time.

    Args:
        q, k, v, causal, softmax_scale, window_size, softcap, return_lse: as in `naive_attention`.
        block_k: number of keys taken in at a time.

    Returns:
        As `naive_attention`. Differentiable by autograd, which keeps every block: no memory is saved in training.

    Raises:
        ValueError, TypeError: from `check_inputs`; ValueError when block_k is not positive.

    Source:
        Rabe, Staats, arXiv 2112.05682; Milakov, Gimelshein, arXiv 1805.02867.
    """
    check_inputs(q, k, v, window_size, softcap, block_k=block_k)
    scale = softmax_scale_of(q, softmax_scale)
    seqlen_q, nheads_k = q.shape[1], k.shape[2]
    visibility = Visibility(seqlen_q, k.shape[1], causal, window_size)
    queries = to_rows(widen(q), nheads_k)  # (batch, nheads_k, group * seqlen_q, headdim)
    state = OnlineSoftmax(tuple(queries.shape[:-1]), q.shape[-1], queries.dtype, q.device)
    for keys in tiles(k.shape[1], block_k):
        mask = visibility.mask(range(seqlen_q), keys, q.device)
        k_tile = to_rows(widen(k[:, keys.start : keys.stop]), nheads_k)  # (batch, nheads_k, n, headdim)
        v_tile = to_rows(widen(v[:, keys.start : keys.stop]), nheads_k)
        state.update(tile_scores(queries, k_tile, scale, softcap, mask), v_tile)
    out, lse = state.finish()
    out = from_rows(out, q.shape[2] // nheads_k).to(q.dtype)
    return (out, lse.reshape(q.shape[0], q.shape[2], seqlen_q)) if return_lse else out


def tile_scores(q_rows: Tensor, k_tile: Tensor, scale: float, softcap: float, mask: Tensor | None) -> Tensor:
    """Scores of a tile: scaled, soft-capped, masked.

    Args:
        q_rows: (batch, nheads_k, group * rows, headdim), see `to_rows`.
        k_tile: (batch, nheads_k, keys, headdim).
        mask: (rows, keys) bool, True where visible, or None.

    Returns:
        (batch, nheads_k, group * rows, keys), -inf where masked.
    """
    scores = q_rows @ k_tile.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        hidden = ~mask.repeat(scores.shape[2] // mask.shape[0], 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def to_rows(x: Tensor, nheads_k: int) -> Tensor:
    """The query heads that share a KV head become rows of one matrix, so that K and V are never repeated.

    (batch, seqlen, nheads, headdim) -> (batch, nheads_k, group * seqlen, headdim)
    """
    return x.unflatten(2, (nheads_k, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def from_rows(rows: Tensor, group: int) -> Tensor:
    """The way back: (batch, nheads_k, group * seqlen, headdim) -> (batch, seqlen, nheads, headdim)."""
    return rows.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)

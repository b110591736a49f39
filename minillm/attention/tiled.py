"""FlashAttention in PyTorch: tiles of queries and keys, one pass forward, recomputation backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.attention.inputs import check_inputs, own_precision, softmax_scale_of
from minillm.attention.masks import Visibility, tiles
from minillm.attention.online import OnlineSoftmax, from_rows, merge_state, tile_scores, to_rows, widen
from minillm.measure.traffic import Counted, in_hbm, on_chip


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    block_q: int = 128,
    block_k: int = 128,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention tile by tile: no buffer grows with seqlen_q · seqlen_k, forward or backward.

    Args:
        q, k, v, causal, softmax_scale, window_size, softcap, return_lse: as in `naive_attention`.
        block_q, block_k: queries and keys in a tile.

    Returns:
        As `naive_attention`; both out and lse are differentiable, in both modes and any number of times.

    Raises:
        ValueError, TypeError: from `check_inputs`; ValueError when a block size is not positive.

    Source:
        FlashAttention-2 (Dao, arXiv 2307.08691), algorithms 1 and 2.
    """
    check_inputs(q, k, v, window_size, softcap, block_q=block_q, block_k=block_k)
    visibility = Visibility(q.shape[1], k.shape[1], causal, window_size)
    tiling = Tiling(visibility, softmax_scale_of(q, softmax_scale), softcap, block_q, block_k)
    out, lse = _apply(q, k, v, tiling)
    return (out, lse) if return_lse else out


class Tiling(NamedTuple):
    """All that a forward and its backward agree on."""

    visibility: Visibility
    scale: float
    softcap: float
    block_q: int
    block_k: int


@torch.compiler.disable  # loops over tiles whose number depends on the lengths: a graph break, and the eager result
def _apply(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    with own_precision(q):
        return _FlashAttention.apply(q, k, v, tiling)


class _FlashAttention(torch.autograd.Function):
    """The backward is itself made of differentiable operations, so that second derivatives are right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, tiling):
        return tiled_forward(q, k, v, tiling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, ctx.tiling = inputs
        ctx.save_for_backward(q, k, v, *output)  # no probabilities: the backward computes them again
        ctx.save_for_forward(q, k, v, *output)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        with own_precision(q):
            return *tiled_backward(grad_out, grad_lse, q, k, v, out, lse, ctx.tiling), None

    @staticmethod
    def jvp(ctx, *tangents):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in zip((q, k, v), tangents, strict=False))
        with own_precision(q):
            return tiled_tangents(dq, dk, dv, q, k, v, out, lse, ctx.tiling)


def tiled_forward(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, algorithm 1: for each tile of queries, one walk over the tiles of keys that it sees.

    Returns:
        out like q; lse (batch, nheads, seqlen_q), natural log, fp32 (float64 for float64).
    """
    nheads_k, seen = k.shape[2], tiling.visibility
    out, lse = torch.empty_like(q), _empty_lse(q)
    in_q, in_k, in_v, to_out, to_lse = _in_hbm(q, k, v, out, lse)
    for queries in tiles(q.shape[1], tiling.block_q):
        q_tile = in_q.load(*_rows(queries))  # (batch, queries, nheads, headdim)
        q_rows = to_rows(widen(q_tile), nheads_k)  # (batch, nheads_k, group * queries, headdim)
        state = OnlineSoftmax(tuple(q_rows.shape[:-1]), q.shape[-1], q_rows.dtype, q.device)
        for keys in seen.key_tiles(queries, tiling.block_k):
            k_tile, v_tile = in_k.load(*_rows(keys)), in_v.load(*_rows(keys))  # (batch, keys, nheads_k, headdim)
            mask = seen.mask(queries, keys, q.device)  # (queries, keys), None where all of them are seen
            scores = tile_scores(q_rows, to_rows(widen(k_tile), nheads_k), tiling.scale, tiling.softcap, mask)
            on_chip(scores=scores)
            state.update(scores, to_rows(widen(v_tile), nheads_k))
            on_chip(acc=state.acc)
            del k_tile, v_tile, scores  # or they would stay on the chip while the next ones come in
        out_tile, lse_tile = _as_public(*state.finish(), len(queries))
        to_out.store(out_tile, *_rows(queries))
        to_lse.store(lse_tile, ..., slice(queries.start, queries.stop))
    return out, lse


def tiled_forward_keys_first(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """FlashAttention-1, algorithm 1: for each tile of keys, a walk over the queries that see it.

    Every result so far is read, merged with the new part and written again; FlashAttention-2 changed the order to
    save that. Where the paper keeps m and l in HBM, this keeps the lse alone. For teaching: there is no backward.

    Returns:
        As `tiled_forward`.
    """
    nheads_k, seen = k.shape[2], tiling.visibility
    out, lse = torch.empty_like(q), _empty_lse(q)
    in_q, in_k, in_v, to_out, to_lse = _in_hbm(q, k, v, out, lse)
    to_out.store(torch.zeros(()), ...)  # line 2
    to_lse.store(torch.tensor(-torch.inf), ...)
    for keys in tiles(k.shape[1], tiling.block_k):
        seeing = [queries for queries in tiles(q.shape[1], tiling.block_q) if seen.sees(queries, keys)]
        if not seeing:
            continue
        k_tile, v_tile = in_k.load(*_rows(keys)), in_v.load(*_rows(keys))  # (batch, keys, nheads_k, headdim)
        for queries in seeing:
            q_tile, columns = in_q.load(*_rows(queries)), slice(queries.start, queries.stop)
            q_rows = to_rows(widen(q_tile), nheads_k)  # (batch, nheads_k, group * queries, headdim)
            mask = seen.mask(queries, keys, q.device)
            scores = tile_scores(q_rows, to_rows(widen(k_tile), nheads_k), tiling.scale, tiling.softcap, mask)
            on_chip(scores=scores)
            state = OnlineSoftmax(tuple(q_rows.shape[:-1]), q.shape[-1], q_rows.dtype, q.device)
            state.update(scores, to_rows(widen(v_tile), nheads_k))
            on_chip(acc=state.acc)
            part = _as_public(*state.finish(), len(queries))
            del q_tile, scores, state  # of these keys only the part of the result stays on the chip
            merged, merged_lse = merge_state(to_out.load(*_rows(queries)), to_lse.load(..., columns), *part)
            to_out.store(merged, *_rows(queries))
            to_lse.store(merged_lse, ..., columns)
    return out, lse


def _in_hbm(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Counted]:
    per_query_head, per_kv_head = q.shape[0] * q.shape[2], k.shape[0] * k.shape[2]
    heads = dict.fromkeys("qkv", per_kv_head) | dict.fromkeys(("q", "out", "lse"), per_query_head)
    return in_hbm(heads, programs=per_kv_head, q=q, k=k, v=v, out=out, lse=lse)


def _empty_lse(q: Tensor) -> Tensor:
    return widen(q[:0]).new_empty(q.shape[0], q.shape[2], q.shape[1])


def _rows(positions: range) -> tuple[slice, slice]:
    return slice(None), slice(positions.start, positions.stop)


def _as_public(out: Tensor, lse: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    """From rows to (batch, seqlen, nheads, headdim) and (batch, nheads, seqlen)."""
    group = out.shape[2] // max(1, seqlen)
    return from_rows(out, group), lse.unflatten(2, (group, -1)).flatten(1, 2)


def tiled_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2: the probabilities come back, tile by tile, from q, k and the saved lse.

    Returns:
        The gradients of q, k and v, like them.
    """
    nheads_k = k.shape[2]
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    # Line 4, and the gradient of lse beside it: d lse / d score is the probability itself.
    delta = (widen(grad_out) * widen(out)).sum(-1).transpose(1, 2) - grad_lse  # (batch, nheads, seqlen_q)
    shift = lse.masked_fill(lse == -torch.inf, 0)  # a row that sees nothing: exp(-inf - 0) is 0, as it must be
    for queries in tiles(q.shape[1], tiling.block_q):
        q_tile, grad_out_tile = _tile(q, queries, nheads_k), _tile(grad_out, queries, nheads_k)
        shift_tile, delta_tile = _row_numbers(shift, queries, nheads_k), _row_numbers(delta, queries, nheads_k)
        grad_q_tile = torch.zeros_like(q_tile)
        for keys in tiling.visibility.key_tiles(queries, tiling.block_k):
            k_tile, v_tile = _tile(k, keys, nheads_k), _tile(v, keys, nheads_k)
            mask = tiling.visibility.mask(queries, keys, q.device)
            scores = tile_scores(q_tile, k_tile, tiling.scale, tiling.softcap, mask)
            p = torch.exp(scores - shift_tile)
            grad_p = grad_out_tile @ v_tile.transpose(-1, -2)
            grad_scores = p * (grad_p - delta_tile)
            grad_scores = grad_scores * score_slope(scores, tiling)
            grad_q_tile += grad_scores @ k_tile
            grad_k[:, keys.start : keys.stop] += from_rows(grad_scores.transpose(-1, -2) @ q_tile, 1)
            grad_v[:, keys.start : keys.stop] += from_rows(p.transpose(-1, -2) @ grad_out_tile, 1)
        grad_q[:, queries.start : queries.stop] = from_rows(grad_q_tile, q.shape[2] // nheads_k)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def score_slope(scores: Tensor, tiling: Tiling) -> Tensor | float:
    """What a score changes by for each 1 that q · k does: the scale, with a softcap times tanh' = 1 - tanh²."""
    if tiling.softcap <= 0:
        return tiling.scale
    capped = (scores / tiling.softcap).masked_fill(scores == -torch.inf, 0)  # a masked score passes nothing on
    return (1 - capped**2) * tiling.scale


def tiled_tangents(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """The derivative in a direction: d lse = Σ p · d score, and d out = Σ p · (d score · v + dv) - d lse · out.

    Returns:
        The tangents of out and lse, like them.
    """
    nheads_k, group = k.shape[2], q.shape[2] // k.shape[2]
    d_out, d_lse = torch.zeros_like(out, dtype=lse.dtype), torch.zeros_like(lse)
    shift = lse.masked_fill(lse == -torch.inf, 0)
    for queries in tiles(q.shape[1], tiling.block_q):
        q_tile, dq_tile, out_tile = (_tile(x, queries, nheads_k) for x in (q, dq, out))
        shift_tile = _row_numbers(shift, queries, nheads_k)
        sum_of_scores, sum_of_values = torch.zeros_like(shift_tile), torch.zeros_like(out_tile)
        for keys in tiling.visibility.key_tiles(queries, tiling.block_k):
            k_tile, v_tile, dk_tile, dv_tile = (_tile(x, keys, nheads_k) for x in (k, v, dk, dv))
            mask = tiling.visibility.mask(queries, keys, q.device)
            scores = tile_scores(q_tile, k_tile, tiling.scale, tiling.softcap, mask)
            p = torch.exp(scores - shift_tile)
            d_scores = dq_tile @ k_tile.transpose(-1, -2) + q_tile @ dk_tile.transpose(-1, -2)
            weighted = p * d_scores * score_slope(scores, tiling)
            sum_of_scores = sum_of_scores + weighted.sum(-1, keepdim=True)
            sum_of_values = sum_of_values + weighted @ v_tile + p @ dv_tile
        rows = slice(queries.start, queries.stop)
        d_out[:, rows] = from_rows(sum_of_values - sum_of_scores * out_tile, group)
        d_lse[:, :, rows] = sum_of_scores.squeeze(-1).unflatten(2, (group, -1)).flatten(1, 2)
    return d_out.to(out.dtype), d_lse


def _tile(x: Tensor, positions: range, nheads_k: int) -> Tensor:
    """(batch, nheads_k, group * len(positions), headdim), fp32 at least."""
    return to_rows(widen(x[_rows(positions)]), nheads_k)


def _row_numbers(x: Tensor, queries: range, nheads_k: int) -> Tensor:
    """One number a row: (batch, nheads, seqlen_q) -> (batch, nheads_k, group * len(queries), 1)."""
    return x[:, :, queries.start : queries.stop].unflatten(1, (nheads_k, -1)).flatten(2, 3)[..., None]

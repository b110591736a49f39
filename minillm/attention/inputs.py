"""Checks of what a caller hands in: every error names the argument, what it got and what it wants."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral

import torch
from torch import Tensor

from minillm.attention.keys import Keys, Options, longest

# Whether the numbers in cu_seqlens, cache_seqlens and block_table are read and checked on a GPU too. Each call then
# waits for the GPU, so it is off: switch it on to find out which call has numbers that do not fit.
CHECK_ON_GPU = os.environ.get("MINILLM_CHECK_ON_GPU") == "1"
DTYPES = ("float16", "bfloat16", "float32", "float64")
INFINITY = float("inf")
PADDED, RAGGED = "(batch, seqlen, nheads, headdim)", "(total, nheads, headdim)"
PAGED = "(num_blocks, page_size, nheads_k, headdim)"


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    softcap: float,
    block_q: int | None = None,
    block_k: int | None = None,
) -> None:
    """Raises ValueError or TypeError where dense tensors are no attention input.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k, v: (batch, seqlen_k, nheads_k, headdim), nheads a multiple of nheads_k.
        window_size: (left, right), each ≥ -1.
        softcap: ≥ 0.
        block_q, block_k: ≥ 1.
    """
    check_call(q, Keys(k, v), Options(window_size=window_size, softcap=softcap, block_q=block_q, block_k=block_k))


def check_call(q: Tensor, keys: Keys, options: Options) -> None:
    """Raises ValueError or TypeError where queries, keys and options do not fit each other.

    The numbers in cu_seqlens, cache_seqlens and block_table are not read from a GPU, which the call would have to wait
    for; only cu_seqlens are, where no max_seqlen comes with them, for then the call reads them anyway. With
    `CHECK_ON_GPU`, or MINILLM_CHECK_ON_GPU=1 in the environment, all of them are.
    """
    if keys.cu_seqlens is not None and (keys.cache_seqlens is not None or keys.block_table is not None):
        raise ValueError("keys have cu_seqlens, and cache_seqlens or block_table beside them: give one or the other")
    if keys.block_table is not None and keys.cache_seqlens is None:
        raise ValueError("keys have a block_table and no cache_seqlens: they say how many keys each sequence has")
    if keys.max_seqlen is not None and keys.cu_seqlens is None:
        raise ValueError(f"max_seqlen is {keys.max_seqlen}, and the keys are not ragged: it goes with cu_seqlens")
    if options.max_seqlen_q is not None and options.cu_seqlens_q is None:
        raise ValueError(f"max_seqlen_q is {options.max_seqlen_q}, and q is not ragged: it goes with cu_seqlens_q")
    layout_k = RAGGED if keys.cu_seqlens is not None else PAGED if keys.block_table is not None else PADDED
    _check_tensors(q, RAGGED if options.cu_seqlens_q is not None else PADDED, keys.k, keys.v, layout_k)
    _check_ragged(q, keys, options)
    if keys.cache_seqlens is not None:
        _check_cached(keys.k, keys.cache_seqlens, keys.block_table)
    window_size = options.window_size
    if not (isinstance(window_size, tuple | list) and len(window_size) == 2 and all(map(_is_limit, window_size))):
        raise ValueError(f"window_size is {window_size}, wants (left, right) in whole numbers with -1 for no limit")
    for name, number in (("softmax_scale", options.softmax_scale), ("softcap", options.softcap)):
        if isinstance(number, Tensor):
            raise TypeError(f"{name} is a Tensor, wants a number: no gradient passes to it, give {name}.item()")
    if options.softmax_scale is not None and not -INFINITY < options.softmax_scale < INFINITY:
        raise ValueError(f"softmax_scale is {options.softmax_scale}, wants a finite number, or None for 1/√headdim")
    if not 0 <= options.softcap < INFINITY:
        raise ValueError(f"softcap is {options.softcap}, wants a positive number, or 0 for none")
    for name, size in options.block_sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, wants 1 or more")


def _check_tensors(q: Tensor, layout_q: str, k: Tensor, v: Tensor, layout_k: str) -> None:
    for name, x, layout in (("q", q, layout_q), ("k", k, layout_k), ("v", v, layout_k)):
        if x.ndim != layout.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, wants {layout}")
        if str(x.dtype) not in {f"torch.{dtype}" for dtype in DTYPES}:
            raise TypeError(f"{name} is {x.dtype}, wants one of {', '.join(DTYPES)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, q is {q.dtype}: they must agree")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q is on {q.device}: they must agree")
        if layout == layout_q == PADDED and x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {x.shape[0]}, q has {q.shape[0]}: they must agree")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name} has headdim {x.shape[-1]}, q has {q.shape[-1]}: they must agree")
    if q.shape[-1] < 1:
        raise ValueError(f"q has headdim {q.shape[-1]}, wants 1 or more")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}, k has {tuple(k.shape)}: they must agree")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] or q.shape[-2] == 0:
        raise ValueError(f"k has {k.shape[-2]} heads, not a divisor of q's {q.shape[-2]}")
    if layout_k == PAGED and k.shape[1] == 0:
        raise ValueError("k has page_size 0, wants 1 or more")


def _is_limit(keys: object) -> bool:
    return isinstance(keys, Integral) and int(keys) >= -1


def _check_ragged(q: Tensor, keys: Keys, options: Options) -> None:
    for name, cu_seqlens, max_seqlen, of, x in (
        ("cu_seqlens_q", options.cu_seqlens_q, options.max_seqlen_q, "q", q),
        ("cu_seqlens_k", keys.cu_seqlens, keys.max_seqlen, "k", keys.k),
    ):
        if cu_seqlens is None:
            continue
        if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
            raise ValueError(f"{name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, wants int32 (batch + 1,)")
        if max_seqlen is None or may_read(cu_seqlens):
            _check_bounds(name, cu_seqlens.tolist(), max_seqlen, of, len(x))
        elif max_seqlen * (len(cu_seqlens) - 1) < len(x):  # all that can be said without reading a GPU's numbers
            raise ValueError(
                f"max_seqlen_{of} is {max_seqlen}: {len(cu_seqlens) - 1} such sequences have fewer rows than {of}, "
                f"which has {len(x)}; give the longest, or an upper bound"
            )
    batch = len(q) if options.cu_seqlens_q is None else len(options.cu_seqlens_q) - 1
    if keys.batch != batch:
        raise ValueError(f"the keys have {keys.batch} sequences, the queries {batch}: they must agree")


def _check_bounds(name: str, bounds: list[int], max_seqlen: int | None, of: str, rows: int) -> None:
    if not bounds or bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
        raise ValueError(f"{name} is {bounds}, wants to rise from 0 to the {rows} rows of {of}")
    if max_seqlen is not None and longest(bounds) > max_seqlen:
        raise ValueError(
            f"max_seqlen_{of} is {max_seqlen}, and a sequence has {longest(bounds)} rows: "
            "give the longest, or an upper bound"
        )


def may_read(numbers: Tensor) -> bool:
    """Whether a check may look at these numbers: on a GPU it would wait for all that was launched before."""
    return CHECK_ON_GPU or not numbers.is_cuda


def _check_cached(k: Tensor, cache_seqlens: Tensor, block_table: Tensor | None) -> None:
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(f"cache_seqlens is {cache_seqlens!r:.60}, wants an int32 tensor (batch,)")
    if cache_seqlens.ndim != 1 or cache_seqlens.dtype != torch.int32:
        raise ValueError(f"cache_seqlens is {cache_seqlens.dtype} {tuple(cache_seqlens.shape)}, wants int32 (batch,)")
    room = k.shape[1]
    if block_table is None:
        if len(k) != len(cache_seqlens):
            raise ValueError(f"cache_seqlens has {len(cache_seqlens)} lengths, k has {len(k)} rows: they must agree")
    else:
        if block_table.ndim != 2 or block_table.dtype != torch.int32 or len(block_table) != len(cache_seqlens):
            got = f"{block_table.dtype} {tuple(block_table.shape)}"
            raise ValueError(f"block_table is {got}, wants int32 ({len(cache_seqlens)}, max_blocks)")
        room *= block_table.shape[1]
    if not may_read(cache_seqlens):
        return
    lengths = cache_seqlens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= room:
        raise ValueError(f"cache_seqlens is {lengths}, wants 0 to {room}, as there is room for")
    for blocks, length in zip([] if block_table is None else block_table.tolist(), lengths, strict=False):
        used = blocks[: -(-length // k.shape[1])]
        if used and not 0 <= min(used) <= max(used) < len(k):
            raise ValueError(f"block_table has the blocks {used}, wants 0 to {len(k) - 1}")


def own_precision(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off, for code that chooses its precisions itself: attention goes by q's."""
    return torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else nullcontext()


def softmax_scale_of(q: Tensor, softmax_scale: float | None) -> float:
    """The scale of the scores: the caller's, or 1/√headdim."""
    return q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

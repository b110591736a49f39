"""What queries attend to. Dense, ragged, cached and paged keys are one description in data, not four code paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Keys:
    """Keys and values of a batch of sequences, and where each sequence's lie.

    | layout | k and v | length of a sequence |
    |---|---|---|
    | dense | (batch, seqlen_k, nheads_k, headdim) | seqlen_k |
    | cached | (batch, capacity, nheads_k, headdim) | its entry in cache_seqlens |
    | paged | (num_blocks, page_size, nheads_k, headdim) | the same; its row of block_table names its pages in order |
    | ragged | (total_k, nheads_k, headdim) | the difference of two cu_seqlens |

    Args:
        k, v: as in the table; keys after RoPE.
        cu_seqlens: (batch + 1,) int32; sequence i holds rows cu_seqlens[i] to cu_seqlens[i + 1] - 1.
        cache_seqlens: (batch,) int32; what lies behind a sequence's length is never used, not even where it is NaN.
        block_table: (batch, max_blocks) int32; entries behind a sequence's last page are never used.
        max_seqlen: an upper bound of a ragged batch's lengths. Without it they are read from cu_seqlens where a kernel
            needs the bound, which waits for a GPU.

    Source:
        The arguments of flash-attn's `flash_attn_varlen_func` and `flash_attn_with_kvcache`.
    """

    k: Tensor
    v: Tensor
    cu_seqlens: Tensor | None = None
    cache_seqlens: Tensor | None = None
    block_table: Tensor | None = None
    max_seqlen: int | None = None

    @property
    def dense(self) -> bool:
        """Whether the shape of k says it all: equally long sequences without padding."""
        return self.cu_seqlens is None and self.cache_seqlens is None

    @property
    def batch(self) -> int:
        """The number of sequences."""
        if self.cu_seqlens is not None:
            return len(self.cu_seqlens) - 1
        return len(self.k if self.cache_seqlens is None else self.cache_seqlens)

    def sequences(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each sequence, (seqlen, nheads_k, headdim): views, and of pages copies."""
        if self.cu_seqlens is not None:
            yield from zip(sequences_of(self.k, self.cu_seqlens), sequences_of(self.v, self.cu_seqlens), strict=True)
        elif self.cache_seqlens is None:
            yield from zip(self.k, self.v, strict=True)
        elif self.block_table is None:
            for k, v, length in zip(self.k, self.v, self.cache_seqlens.tolist(), strict=True):
                yield k[:length], v[:length]
        else:
            page_size = self.k.shape[1]
            for blocks, length in zip(self.block_table, self.cache_seqlens.tolist(), strict=True):
                pages = blocks[: -(-length // page_size)].long()
                yield self.k[pages].flatten(0, 1)[:length], self.v[pages].flatten(0, 1)[:length]


@dataclass(frozen=True)
class Options:
    """What a call asks for beside its tensors.

    Args:
        causal, softmax_scale, window_size, softcap, return_lse: as in `minillm.attention.attention`.
        block_q, block_k: tile sizes, for back ends that have tiles; None for their own.
        cu_seqlens_q: (batch + 1,) int32 where q is a ragged batch, (total_q, nheads, headdim); None for a padded one.
        max_seqlen_q: an upper bound of a ragged batch's lengths, as `Keys.max_seqlen`.
    """

    causal: bool = False
    softmax_scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    return_lse: bool = False
    block_q: int | None = None
    block_k: int | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None

    @property
    def block_sizes(self) -> dict[str, int]:
        """The tile sizes that were asked for, by name."""
        sizes = {"block_q": self.block_q, "block_k": self.block_k}
        return {name: size for name, size in sizes.items() if size is not None}

    @property
    def arguments(self) -> dict[str, Any]:
        """The options of a call with dense tensors, by name."""
        names = ("causal", "softmax_scale", "window_size", "softcap", "return_lse")
        return {name: getattr(self, name) for name in names} | self.block_sizes


def each_sequence(attend: Callable[..., Any], q: Tensor, keys: Keys, options: Options) -> Any:
    """Runs a function that takes dense tensors only: once where all is dense, else once for each sequence.

    Args:
        attend: called as `naive_attention` is.
        q, keys, options: of a call that `check_call` has accepted.

    Returns:
        As `minillm.attention.attend`.
    """
    ragged = options.cu_seqlens_q is not None
    if keys.dense and not ragged:
        return attend(q, keys.k, keys.v, **options.arguments)
    rows = q if options.cu_seqlens_q is None else sequences_of(q, options.cu_seqlens_q)
    results = [
        attend(queries[None], k[None], v[None], **options.arguments)
        for queries, (k, v) in zip(rows, keys.sequences(), strict=True)
    ]
    outs = [result[0] if options.return_lse else result for result in results]
    out = torch.cat([q[:0], *(out[0] if ragged else out for out in outs)])
    if not options.return_lse:
        return out
    none = q[:0, ..., 0].transpose(-1, -2).to(torch.promote_types(q.dtype, torch.float32))  # the lse of no query
    lses = [lse[0] if ragged else lse for _, lse in results]
    return out, torch.cat([none, *lses], dim=1 if ragged else 0)  # (nheads, total_q) or (batch, nheads, seqlen_q)


def as_ragged(
    q: Tensor, keys: Keys, options: Options
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, int, int]]:
    """The same call as a ragged batch, for a kernel that has one launch for all sequences.

    Returns:
        q (total_q, nheads, headdim); k and v (total_k, nheads_k, headdim), copied where they had another layout; and
        (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k).
    """
    cu_seqlens_q, max_seqlen_q = options.cu_seqlens_q, options.max_seqlen_q
    if cu_seqlens_q is None:
        cu_seqlens_q, max_seqlen_q = cu_seqlens_of([q.shape[1]] * len(q), q.device), q.shape[1]
        q = q.flatten(0, 1)
    k, v, cu_seqlens_k, max_seqlen_k = keys.k, keys.v, keys.cu_seqlens, keys.max_seqlen
    if cu_seqlens_k is None:
        rows = list(keys.sequences())
        lengths = [len(key) for key, _ in rows]
        k, v = (torch.cat([x[:0].flatten(0, 1), *(row[i] for row in rows)]) for i, x in enumerate((k, v)))
        cu_seqlens_k, max_seqlen_k = cu_seqlens_of(lengths, q.device), max(lengths, default=0)
    if max_seqlen_q is None:
        max_seqlen_q = longest(cu_seqlens_q.tolist())
    if max_seqlen_k is None:
        max_seqlen_k = longest(cu_seqlens_k.tolist())
    return q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def sequences_of(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The sequences of a ragged batch as views: (total, …) -> [(seqlen, …), …]."""
    return [x[start:stop] for start, stop in pairwise(cu_seqlens.tolist())]


def cu_seqlens_of(lengths: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
    """Where each sequence begins when they lie one behind the other: (batch,) lengths -> (batch + 1,) int32."""
    lengths = torch.as_tensor(lengths, dtype=torch.int32, device=device)
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def longest(bounds: list[int]) -> int:
    """The length of a ragged batch's longest sequence, from its cu_seqlens as a list; 0 where there is none."""
    return max((stop - start for start, stop in pairwise(bounds)), default=0)

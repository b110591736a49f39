"""One signature, many back ends: this file alone decides which implementation runs, and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from minillm.attention import sdpa, triton
from minillm.attention.inputs import check_call, own_precision
from minillm.attention.keys import Keys, Options, each_sequence
from minillm.attention.naive import naive_attention
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

    It computes in q's dtype, under autocast too. "naive" and "tiled" have derivatives of all orders, in both modes;
    "sdpa" and "triton" have one backward, and raise an error where more is asked for.

    Example:
        >>> q = torch.randn(1, 5, 8, 64)
        >>> k, v = torch.randn(2, 1, 12, 2, 64)  # four query heads on each KV head
        >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([1, 5, 8, 64]), torch.Size([1, 8, 5]))
    """
    options = Options(causal, softmax_scale, window_size, softcap, return_lse, block_q, block_k)
    return _run(q, Keys(k, v), options, backend)


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, backend: str = "auto", **options
) -> Any:
    """Attention over a ragged batch: sequences of different lengths, one behind the other, without padding.

    Args:
        q: (total_q, nheads, headdim).
        k, v: (total_k, nheads_k, headdim).
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32; sequence i holds rows cu_seqlens[i] to cu_seqlens[i + 1] - 1.
        backend, options: as in `attention`; on a GPU "auto" tries the Triton kernel first, which has one launch for
            all sequences.

    Returns:
        out like q; with `return_lse`, (out, lse), lse (nheads, total_q), natural log.

    Raises:
        ValueError: where the cu_seqlens do not fit each other or the tensors; and as `attention` does.

    Source:
        The interface of flash-attn's `flash_attn_varlen_func`, less its max_seqlen arguments.

    Example:
        >>> q, k, v = torch.randn(3, 7, 2, 16)  # sequences of 3 and of 4 tokens
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> attention_varlen(q, k, v, cu_seqlens, cu_seqlens, causal=True).shape
        torch.Size([7, 2, 16])
    """
    return attend(q, Keys(k, v, cu_seqlens_k), backend=backend, cu_seqlens_q=cu_seqlens_q, **options)


def attend(q: Tensor, keys: Keys, *, backend: str = "auto", **options) -> Any:
    """Attention to keys of any layout: dense, ragged, cached or paged.

    Args:
        q: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim) with `cu_seqlens_q`.
        keys: as many sequences.
        backend: as in `attention`.
        options: as in `Options`: those of `attention`, and cu_seqlens_q and max_seqlen_q for ragged queries.

    Returns:
        out like q; with `return_lse`, (out, lse), lse (batch, nheads, seqlen_q) or (nheads, total_q), natural log.

    Raises:
        ValueError, TypeError: as `attention`; and where arrays of lengths or pages do not fit the tensors.

    Example:
        >>> q = torch.randn(2, 1, 8, 64)  # one new token in each of two sequences
        >>> k, v = torch.randn(2, 2, 100, 2, 64)  # room for 100 keys each, of which 7 and 30 are there
        >>> lengths = torch.tensor([7, 30], dtype=torch.int32)
        >>> attend(q, Keys(k, v, cache_seqlens=lengths), causal=True).shape
        torch.Size([2, 1, 8, 64])
    """
    return _run(q, keys, Options(**options), backend)


def choose_backend(q: Tensor, k: Tensor | Keys, v: Tensor | None = None, *, backend: str = "auto", **options) -> Choice:
    """Which back end `attention` or `attend` runs for these arguments, and why.

    Args:
        q, k, v, backend, options: as given to `attention`; or q, `Keys`, backend and options, as given to `attend`.

    Raises:
        ValueError, TypeError: where the call itself would raise.

    Example:
        >>> q, k, v = torch.randn(3, 1, 5, 2, 16)
        >>> print(choose_backend(q, k, v, backend="tiled"))
        tiled: asked for by name
    """
    if not isinstance(k, Keys):
        if v is None:
            raise TypeError("v is missing: give k and v, or Keys in place of both")
        k = Keys(k, v)
    return _checked_choice(q, k, Options(**options), backend)


@dataclass(frozen=True)
class Choice:
    """A back end's name, why it was taken, and what kept those before it from being taken ({name: reason})."""

    name: str
    reason: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        others = "".join(f"; not {name}: it {objection}" for name, objection in self.passed_over.items())
        return f"{self.name}: {self.reason}{others}"


@dataclass(frozen=True)
class Backend:
    """An implementation, the reason to take it, and the reasons not to. All are called with (q, keys, options).

    Args:
        strength: why "auto" takes it.
        run: the attention, as `attend` returns it.
        why_not: what it cannot do, None where it can; holds for a call by name, too.
        slow: why "auto" passes it over although it can.
    """

    strength: str
    run: Callable[[Tensor, Keys, Options], Any]
    why_not: Callable[[Tensor, Keys, Options], str | None] = lambda q, keys, options: None
    slow: Callable[[Tensor, Keys, Options], str | None] = lambda q, keys, options: None


def _run(q: Tensor, keys: Keys, options: Options, backend: str) -> Any:
    choice = _checked_choice(q, keys, options, backend)
    with own_precision(q):
        return BACKENDS[choice.name].run(q, keys, options)


def _checked_choice(q: Tensor, keys: Keys, options: Options, backend: str) -> Choice:
    check_call(q, keys, options)
    return _choose(q, keys, options, backend)


def _choose(q: Tensor, keys: Keys, options: Options, name: str) -> Choice:
    if name == "auto":
        return _first_that_can(q, keys, options)
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, wants one of auto, {', '.join(BACKENDS)}")
    if reason := BACKENDS[name].why_not(q, keys, options):
        raise ValueError(f"backend {name!r} {reason}: take backend='auto' or another one")
    return Choice(name, "asked for by name", {})


def _first_that_can(q: Tensor, keys: Keys, options: Options) -> Choice:
    against: dict[str, str] = {}
    for name in ORDER:
        reason = BACKENDS[name].why_not(q, keys, options) or BACKENDS[name].slow(q, keys, options)
        if reason is None:
            return Choice(name, BACKENDS[name].strength, against)
        against[name] = reason
    raise AssertionError(f"the last of {ORDER} does everything")


def _no_tiles(q: Tensor, keys: Keys, options: Options) -> str | None:
    return "has no block_q and block_k" if options.block_sizes else None


def _one_by_one(q: Tensor, keys: Keys, options: Options) -> str | None:
    """A launch for each sequence is slow where the Triton kernel has one launch for all of them."""
    if keys.dense and options.cu_seqlens_q is None:
        return None
    kernel = BACKENDS["triton"]
    one_launch = kernel.why_not(q, keys, options) is None and kernel.slow(q, keys, options) is None
    return "would take the sequences one by one" if one_launch else None


BACKENDS = {
    "naive": Backend("the whole score matrix in memory", partial(each_sequence, naive_attention), _no_tiles),
    "tiled": Backend("tiles in PyTorch: does everything, in little memory", partial(each_sequence, flash_attention)),
    "sdpa": Backend("PyTorch's fused kernel, the fastest one here", sdpa.run, sdpa.why_not, _one_by_one),
    "triton": Backend(
        "the course's FlashAttention-2 kernel: does everything, on a GPU", triton.run, triton.why_not, triton.slow
    ),
}
ORDER = ("sdpa", "triton", "tiled")  # of "auto"; "naive" runs only by name

"""The roofline: what a GPU could do at best, from its datasheet and the work's FLOPs and bytes.

A kernel that does F floating-point operations and moves B bytes between HBM and the chip takes at least
max(F / peak rate, B / bandwidth) seconds. Where both are equal lies the ridge: work with fewer FLOPs a byte is
bound by memory, work with more by the Tensor Cores.

Source: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from typing import Literal

from minillm.measure.gpus import GPU


def ridge(gpu: GPU, dtype: str | None = None) -> float:
    """The arithmetic intensity at which memory and Tensor Cores take equally long.

    Args:
        gpu: an entry of ``GPUS``.
        dtype: as in ``GPU.flops``.

    Returns:
        FLOPs a byte. Below it, work is bound by memory; above it, by computing.

    Example:
        >>> from minillm.measure import GPUS
        >>> round(ridge(GPUS["H100"]))
        295
    """
    return gpu.flops(dtype) / gpu.bandwidth


def attainable(gpu: GPU, intensity: float, dtype: str | None = None) -> float:
    """The roof over a given arithmetic intensity.

    Args:
        gpu: an entry of ``GPUS``.
        intensity: FLOPs a byte of device memory traffic.
        dtype: as in ``GPU.flops``.

    Returns:
        FLOP/s, at most.

    Raises:
        ValueError: intensity is negative.

    Example:
        >>> from minillm.measure import GPUS
        >>> attainable(GPUS["H100"], intensity=1) / 1e12  # one operation a byte, as in decoding in bf16: TFLOP/s
        3.35
    """
    _check_not_negative(intensity=intensity)
    return min(gpu.flops(dtype), intensity * gpu.bandwidth)


def time_bound(gpu: GPU, flops: float, nbytes: float, dtype: str | None = None) -> float:
    """The shortest time that the work can take, computing and memory traffic fully overlapped.

    Args:
        gpu: an entry of ``GPUS``.
        flops: floating-point operations, on Tensor Cores.
        nbytes: bytes moved between device memory and the chip.
        dtype: as in ``GPU.flops``.

    Returns:
        Seconds, at least.

    Raises:
        ValueError: flops or nbytes is negative.

    Example:
        >>> from minillm.measure import GPUS
        >>> seconds = time_bound(GPUS["H100"], flops=2e9, nbytes=2e9)  # one token by a billion weights in bf16
        >>> f"{seconds * 1e3:.1f} ms"  # memory is the limit: computing takes 0.002 ms
        '0.6 ms'
    """
    _check_not_negative(flops=flops, nbytes=nbytes)
    return max(flops / gpu.flops(dtype), nbytes / gpu.bandwidth)


def attention_flops(
    batch: int,
    nheads: int,
    seqlen_q: int,
    seqlen_k: int,
    headdim: int,
    causal: bool = False,
    count: Literal["exact", "published"] = "exact",
) -> int:
    """FLOPs of an attention forward: two matrix products, 4 · headdim for each (query, key) pair that is seen.

    The softmax is not counted, by convention. A backward by recomputation has five products: 2.5 times as many.

    Args:
        batch: sequences.
        nheads: query heads; grouped-query attention shares bytes, not FLOPs.
        seqlen_q: queries of a sequence.
        seqlen_k: keys of a sequence.
        headdim: of q, k and v.
        causal: bottom-right aligned.
        count: "exact" counts the pairs that a causal mask leaves: n (n + 1) / 2 for n queries and n keys.
            "published" is the convention of flash-attn's benchmarks, half of the square: use it beside published
            TFLOPS. For n = 16k both agree to 0.006%.

    Returns:
        Floating-point operations; a multiply-add is two.

    Raises:
        ValueError: a size is negative, or count is neither of the two.

    Source: ``flops`` in hopper/benchmark_attn.py of https://github.com/Dao-AILab/flash-attention ("published").

    Example:
        >>> attention_flops(batch=1, nheads=16, seqlen_q=1024, seqlen_k=1024, headdim=64) / 1e9
        4.294967296
        >>> attention_flops(batch=1, nheads=1, seqlen_q=1, seqlen_k=9, headdim=64, causal=True)  # sees all 9
        2304
    """
    _check_not_negative(batch=batch, nheads=nheads, seqlen_q=seqlen_q, seqlen_k=seqlen_k, headdim=headdim)
    if count not in ("exact", "published"):
        raise ValueError(f"count is {count!r}; it is 'exact' or 'published'")
    pairs = seqlen_q * seqlen_k
    if causal:
        pairs = _visible_pairs(seqlen_q, seqlen_k)
    if causal and count == "published":
        # The keys that a query sees, on average; doubled here, so that the halving below is exact.
        return 2 * batch * nheads * headdim * seqlen_q * (max(0, seqlen_k - seqlen_q) + seqlen_k)
    return 4 * batch * nheads * headdim * pairs


def _visible_pairs(seqlen_q: int, seqlen_k: int) -> int:
    """Pairs under a bottom-right causal mask: query i sees the keys j ≤ i + (seqlen_k − seqlen_q)."""
    rows = min(seqlen_q, seqlen_k)  # with more queries than keys, the first queries see nothing
    return rows * (seqlen_k - rows) + rows * (rows + 1) // 2


def _check_not_negative(**sizes: float) -> None:
    for name, size in sizes.items():
        if not size >= 0:
            raise ValueError(f"{name} is {size}; it cannot be less than 0")

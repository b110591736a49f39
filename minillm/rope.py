"""Rotary position embedding (旋转位置编码), in Llama's convention: the halves of a head are the pairs.

Pair i of a head turns by a frequency (radians a position). A model that was trained on short texts reads longer ones
when its frequencies are made lower; `RopeScaling` says how, and `pair_frequencies` has a line or two for each way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minillm.config import RopeScaling


def rotary_tables(
    positions: Tensor,
    head_dim: int,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles at given positions.

    Args:
        positions: (seqlen,) or (batch, seqlen), any integer dtype; may be negative.
        head_dim: size of one head, even.
        theta: base of the frequencies; pair i turns by `theta ** (-2 i / head_dim)` radians a position.
        scaling: how the frequencies are lowered; None: they are not.
        lengths: for "dynamic", how many tokens the text has so far at each position, or in each row as (batch, 1).

    Returns:
        cos, sin: positions.shape + (head_dim / 2,), fp32; with "yarn", times its attention factor.

    Raises:
        ValueError: where "dynamic" has no lengths.

    Source:
        RoFormer (Su et al., arXiv 2104.09864), section 3.2.2.
    """
    angles = positions[..., None].float() * pair_frequencies(head_dim, theta, scaling, lengths, positions.device)
    if scaling is None or scaling.rope_type != "yarn":
        return angles.cos(), angles.sin()
    factor = scaling.attention_factor
    if factor is None:  # YaRN, section 3.4: its √(1/t), for q and for k
        factor = 0.1 * math.log(scaling.factor) + 1
    return angles.cos() * factor, angles.sin() * factor


def pair_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    lengths: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The radians that each pair of a head turns by from one position to the next.

    Args:
        head_dim, theta, scaling, lengths: as in `rotary_tables`.
        device: of the result.

    Returns:
        (head_dim / 2,) fp32; lengths.shape + (head_dim / 2,) with "dynamic".

    Source:
        "linear": Position Interpolation (Chen et al., arXiv 2306.15595), section 2.3.
        "dynamic", "yarn": YaRN (Peng et al., arXiv 2309.00071), sections 3.3 and 3.2; the base of "dynamic" is
        transformers' (modeling_rope_utils.py, `_compute_dynamic_ntk_parameters`).
        "llama3": Meta's llama-models, `apply_scaling` in models/llama3/model.py (Llama 3.1).
    """
    pair = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    if scaling is None:
        return theta ** (-pair / head_dim)
    if scaling.rope_type == "dynamic":
        if lengths is None:
            raise ValueError("lengths is None: rope_scaling 'dynamic' wants the tokens of the text so far")
        stretch = lengths.clamp_min(scaling.original_max_position_embeddings) / scaling.original_max_position_embeddings
        base = theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
        return base[..., None] ** (-pair / head_dim)
    high = theta ** (-pair / head_dim)  # for pairs that turn often within an original text
    low = high / scaling.factor  # for pairs that turn seldom: these would meet angles that they never learned
    if scaling.rope_type == "linear":
        return low
    share = _yarn_share(head_dim, theta, scaling, pair) if scaling.rope_type == "yarn" else _llama3_share(high, scaling)
    return torch.lerp(low, high, share)


def _llama3_share(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of its own frequency each pair keeps, from 0 to 1: linear in its turns within an original text."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    slow, fast = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - slow) / (fast - slow)).clamp(0, 1)


def _yarn_share(head_dim: int, theta: float, scaling: RopeScaling, pair: Tensor) -> Tensor:
    """The same, but linear in the pair's number, between the pairs that turn beta_fast and beta_slow times."""

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_position_embeddings / times
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as transformers does: no division by zero
    return 1 - ((pair / 2 - first) / (last - first)).clamp(0, 1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every pair (x[i], x[i + head_dim / 2]) of every head by its position's angle.

    Args:
        x: (batch, seqlen, nheads, headdim).
        cos, sin: (seqlen, headdim / 2) or (batch, seqlen, headdim / 2), from `rotary_tables`.

    Returns:
        Like x, same dtype.

    Example:
        >>> q = torch.randn(1, 3, 4, 64)
        >>> turned = apply_rope(q, *rotary_tables(torch.arange(3), head_dim=64))
        >>> torch.equal(turned[:, 0], q[:, 0])  # position 0 is not turned
        True
    """
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)  # one angle for all heads
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def shift_rope(x: Tensor, offset: int | Tensor, theta: float = 10_000.0, scaling: RopeScaling | None = None) -> Tensor:
    """Moves what is rotated already: keys of positions p become keys of positions p + offset.

    Two rotations of one plane add their angles, so no key has to be computed again.

    Args:
        x: (batch, seqlen, nheads, headdim), after `apply_rope`.
        offset: positions to move by, may be negative; one number, or (batch, seqlen) integers.
        theta, scaling: as in `rotary_tables`.

    Returns:
        Like x, same dtype.

    Raises:
        ValueError: for a scaling "dynamic", whose angles are not those of a position alone.

    Example:
        >>> key = torch.randn(1, 1, 2, 64, dtype=torch.float64)
        >>> at_3, at_8 = (apply_rope(key, *rotary_tables(torch.tensor([p]), 64)) for p in (3, 8))
        >>> bool((shift_rope(at_3, 5) - at_8).abs().max() < 1e-5)
        True
    """
    if scaling is not None and scaling.rope_type == "dynamic":
        raise ValueError("scaling is 'dynamic', whose angles change with the text's length: compute the keys again")
    offsets = torch.as_tensor(offset, device=x.device).expand(x.shape[:2])
    angles = offsets[..., None].float() * pair_frequencies(x.shape[-1], theta, scaling, device=x.device)
    return apply_rope(x, angles.cos(), angles.sin())  # without an attention factor: x has it already

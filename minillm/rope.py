"""Rotary position embedding (旋转位置编码), in Llama's convention: the halves of a head are the pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles at given positions.

    Args:
        positions: (seqlen,) or (batch, seqlen), any integer dtype; may be negative.
        head_dim: size of one head, even.
        theta: base of the frequencies; pair i turns by `theta ** (-2 i / head_dim)` radians a position.

    Returns:
        cos, sin: positions.shape + (head_dim / 2,), fp32.

    Source:
        RoFormer (Su et al., arXiv 2104.09864), section 3.2.2.
    """
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * theta ** (-pair / head_dim)
    return angles.cos(), angles.sin()


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


def shift_rope(x: Tensor, offset: int | Tensor, theta: float = 10_000.0) -> Tensor:
    """Moves what is rotated already: keys of positions p become keys of positions p + offset.

    Two rotations of one plane add their angles, so no key has to be computed again.

    Args:
        x: (batch, seqlen, nheads, headdim), after `apply_rope`.
        offset: positions to move by, may be negative; one number, or (batch, seqlen) integers.
        theta: as in `rotary_tables`.

    Returns:
        Like x, same dtype.

    Example:
        >>> key = torch.randn(1, 1, 2, 64, dtype=torch.float64)
        >>> at_3, at_8 = (apply_rope(key, *rotary_tables(torch.tensor([p]), 64)) for p in (3, 8))
        >>> bool((shift_rope(at_3, 5) - at_8).abs().max() < 1e-5)
        True
    """
    positions = torch.as_tensor(offset, device=x.device).expand(x.shape[:2])
    return apply_rope(x, *rotary_tables(positions, x.shape[-1], theta))

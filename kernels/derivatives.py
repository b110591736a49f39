"""Which derivatives a call is asked for: a fused kernel has its backward, and would drop everything else unseen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation may pass through any of these: a dual tensor, or one inside of `torch.func`.

    Under `torch.func` a tangent can lie below other transforms, where it is not seen; while a level of forward mode is
    open, each tensor that a transform has wrapped counts.
    """
    if forward_ad._current_level < 0:
        return False
    return any(in_torch_func(x) or forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def in_torch_func(*tensors: Tensor) -> bool:
    """Whether `torch.func` differentiates (grad, vjp, jvp …) with respect to any of these."""
    if torch.compiler.is_compiling():  # then torch.compile takes the transforms apart itself
        return False
    return any(torch._C._functorch.is_gradtrackingtensor(x) for x in tensors)

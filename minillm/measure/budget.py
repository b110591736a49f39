"""The error budget: a result may be off by what the naive method gets wrong in the same precision, and little more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The error that was found, the limit, and a complaint about anything else (empty where there is none)."""

    error: float
    limit: float
    complaint: str = ""

    def __bool__(self) -> bool:
        return not self.complaint and self.error <= self.limit

    def __str__(self) -> str:
        verdict = self.complaint or ("within" if self else "over")
        return f"error {self.error:.1e}, budget {self.limit:.1e}: {verdict}"


def error_budget(
    ours: Tensor,
    naive: Tensor,
    reference: Tensor,
    *,
    factor: float = 2,
    multiple: float = 4,
    scale: float | None = None,
) -> Budget:
    """Compares a result with float64, allowing it what the naive method gets wrong in the same precision.

    NaN never passes, infinities must match exactly, and on the finite rest
    `max|ours - reference| ≤ factor · max|naive - reference| + multiple · eps · scale`.

    Args:
        ours: the result to judge.
        naive: the naive method's result in the same dtype; any shape equal to ours.
        reference: the naive method's result in float64.
        factor: 2 for results, 3 for gradients.
        multiple: 4, or 8 where logits are large (× 30). A float64 result gets 16 times as much, because the
            reference is then no better than what it judges.
        scale: max|reference| when left out. The gradients of q, k and v share the largest of theirs: that of q
            is a difference of terms as large, exactly 0 where a row sees one key.

    Returns:
        A `Budget`, true where ours is within it.

    Source:
        flash-attn's tests compare in this way (factor 2, gradients 3).

    Example:
        >>> x = torch.rand(100, dtype=torch.float64)
        >>> bool(error_budget(x.float(), x.float(), x)), bool(error_budget(x.float() + 1e-3, x.float(), x))
        (True, False)
    """
    if ours.shape != reference.shape:
        return Budget(torch.inf, 0, f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}")
    ours64, naive64, reference = (x.detach().double().cpu() for x in (ours, naive, reference))
    if ours64.isnan().any():
        return Budget(torch.inf, 0, f"{int(ours64.isnan().sum())} NaN")
    infinite = reference.isinf() | ours64.isinf()
    if not torch.equal(ours64[infinite], reference[infinite]):
        return Budget(torch.inf, 0, f"infinities differ at {int((ours64 != reference)[infinite].sum())} places")
    finite = ~infinite
    if ours.dtype == torch.float64:
        multiple *= 16
    tiny = multiple * torch.finfo(ours.dtype).eps * (_largest(reference[finite]) if scale is None else scale)
    limit = factor * _largest(naive64[finite] - reference[finite]) + tiny
    return Budget(_largest(ours64[finite] - reference[finite]), limit)


def assert_within_budget(ours: Tensor, naive: Tensor, reference: Tensor, **options) -> None:
    """Raises AssertionError, with error and limit, where the result is over its `error_budget`."""
    budget = error_budget(ours, naive, reference, **options)
    assert budget, str(budget)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0

"""The grid of flash-attn's tests, walked pairwise, and the one check that every back end goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from allpairspy import AllPairs
from torch import Tensor

from minillm.attention import naive_attention
from minillm.measure import error_budget

HEADDIMS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
SEQLENS = ((113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256))
LONG_SEQLENS = ((1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048))
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}


@dataclass(frozen=True)
class Case:
    seqlens: tuple[int, int]
    headdim: int
    heads: str
    causal: bool
    local: bool

    @property
    def window_size(self) -> tuple[int, int]:
        return (self.seqlens[1] // 3, self.seqlens[1] // 7) if self.local else (-1, -1)

    def __str__(self) -> str:
        flags = ("-causal" if self.causal else "") + ("-local" if self.local else "")
        return f"{self.seqlens[0]}x{self.seqlens[1]}-d{self.headdim}-{self.heads}{flags}"


def pairwise_cases() -> list[Case]:
    """Every pair of values of any two factors is in some case."""
    return [Case(*values) for values in AllPairs([SEQLENS, HEADDIMS, list(HEADS), [False, True], [False, True]])]


def long_cases() -> list[Case]:
    return [Case(seqlens, 64, "gqa", causal=i % 2 == 0, local=i == 3) for i, seqlens in enumerate(LONG_SEQLENS)]


def random_qkv(seqlens, heads, headdim, dtype=torch.float32, batch=1, seed=0, magnitude=1.0) -> list[Tensor]:
    """q (batch, sq, nheads, headdim), k and v (batch, sk, nheads_k, headdim), normally distributed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(seqlen, nheads):
        return torch.randn(batch, seqlen, nheads, headdim, generator=generator, dtype=torch.float64)

    q, k, v = normal(seqlens[0], heads[0]), normal(seqlens[1], heads[1]), normal(seqlens[1], heads[1])
    return [x.to(dtype) for x in (q * magnitude, k, v)]


class Judge:
    """Compares implementations with float64 on one input, forward and backward; naive runs once for all."""

    def __init__(self, qkv: list[Tensor], *, multiple: float = 4, **options):
        self.qkv, self.options, self.multiple = qkv, options, multiple
        shape = qkv[0].shape
        self.grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.reference = self.run(naive_attention, [x.double() for x in qkv])
        self.naive = self.run(naive_attention, qkv)

    def run(self, function: Callable, qkv: list[Tensor], *, lse: bool = True, grad: bool = True) -> dict[str, Tensor]:
        """out, lse where the function returns it, and the gradients of q, k and v where asked for."""
        leaves = [x.clone().requires_grad_(grad) for x in qkv]
        if lse:
            out, log_sum = function(*leaves, return_lse=True, **self.options)
            results = {"out": out, "lse": log_sum}
        else:
            out = function(*leaves, **self.options)
            results = {"out": out}
        if grad:
            loss = (out * self.grad_out.to(out.dtype)).sum() + 0 * sum(x.sum() for x in leaves)  # no keys: no graph
            grads = torch.autograd.grad(loss, leaves)
            results |= dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
        return results

    def check(self, function: Callable, **what) -> None:
        """Raises AssertionError with the figures where any result of `run(function, …, **what)` is over its budget."""
        grads = [x.abs().max().item() for name, x in self.reference.items() if name.startswith("grad") and x.numel()]
        for name, result in self.run(function, self.qkv, **what).items():
            options = {"factor": 3, "scale": max(grads, default=0)} if name.startswith("grad") else {"factor": 2}
            budget = error_budget(result, self.naive[name], self.reference[name], multiple=self.multiple, **options)
            assert budget, f"{name}: {budget}"

"""Correctness before speed: attention and its gradients against float64, under the error budget."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.flash_attention import Ragged
from minillm.attention import naive_attention
from minillm.measure import assert_within_budget


def random_qkv(
    seqlens: tuple[int, int], heads: tuple[int, int], headdim: int, dtype: torch.dtype, device: str, batch: int = 1
) -> list[Tensor]:
    """q (batch, sq, nheads, headdim), k and v (batch, sk, nheads_k, headdim), normally distributed, fresh each time."""
    shapes = [(batch, seqlens[i > 0], heads[i > 0], headdim) for i in range(3)]
    return [torch.randn(shape, device=device, dtype=torch.float32).to(dtype) for shape in shapes]


def random_ragged(
    lengths: list[tuple[int, int]], heads: tuple[int, int], headdim: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Ragged]:
    """The same for a ragged batch: `lengths` has a pair (queries, keys) for each sequence."""
    columns = list(zip(*lengths, strict=True))
    totals = (sum(columns[0]), sum(columns[1]))
    qkv = [x[0] for x in random_qkv(totals, heads, headdim, dtype, device)]
    bounds = [torch.tensor([0, *column]).cumsum(0, dtype=torch.int32).to(device) for column in columns]
    return qkv, Ragged(bounds[0], bounds[1], max(columns[0]), max(columns[1]))


def naive(q: Tensor, k: Tensor, v: Tensor, **options) -> Any:
    """The naive method with its lse: what the error budget compares with."""
    return naive_attention(q, k, v, return_lse=True, **options)


def naive_one_by_one(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, **options) -> tuple[Tensor, Tensor]:
    """The naive method on each sequence of a ragged batch."""
    bounds_q, bounds_k = (bounds.tolist() for bounds in ragged[:2])
    outs, lses = [], []
    for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        out, lse = naive(q[None, a:b], k[None, c:d], v[None, c:d], **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def assert_right(
    function: Callable, qkv: list[Tensor], *, naive: Callable = naive, backward: bool = True, **options
) -> None:
    """Raises AssertionError with the figures where out, lse or a gradient of `function` is over its budget.

    Args:
        function: (q, k, v, **options) -> (out, lse), lse -inf where a row sees no key.
        qkv: the inputs.
        naive: the baseline, called in the same way.
        backward: also compare the gradients of q, k and v.
        options: `causal`, `window_size`, `softcap`, `softmax_scale`.
    """
    grad_out = torch.randn_like(qkv[0])

    def results(function: Callable, qkv: list[Tensor]) -> dict[str, Tensor]:
        leaves = [x.detach().clone().requires_grad_(backward) for x in qkv]
        out, lse = function(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype)) if backward else ()
        return {"out": out, "lse": lse} | dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=False))

    with memory_full_of_nan():
        ours = results(function, qkv)
    same, exact = results(naive, qkv), results(naive, [x.double() for x in qkv])
    scale = max((x.abs().max().item() for name, x in exact.items() if name.startswith("grad")), default=0)
    for name in ours:
        gradient = {"factor": 3, "scale": scale} if name.startswith("grad") else {}
        try:
            assert_within_budget(ours[name], same[name], exact[name], **gradient)
        except AssertionError as error:
            shapes = " ".join(str(tuple(x.shape)) for x in qkv[:2])
            raise AssertionError(f"{name} of {shapes} {qkv[0].dtype}, {options}: {error}") from error


@contextmanager
def memory_full_of_nan() -> Iterator[None]:
    """New tensors hold NaN until they are written, so that an element which a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it torch.empty fills what it returns
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def interpreter_fault(call: Callable[[], object]) -> str:
    """Why Triton's interpreter cannot run a small call here, "" where it can.

    That of triton 3.6.0 makes an int of an array with one element wherever a loop ends at a tensor, which numpy 2.4
    refuses. Any other error is not caught.
    """
    try:
        call()
    except Exception as error:  # the interpreter wraps it in its own
        if "only 0-dimensional arrays" not in str(error):
            raise
        versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "numpy"))
        return f"Triton's interpreter does not run with {versions}; with triton 3.7 or newer it does ({error})"
    return ""

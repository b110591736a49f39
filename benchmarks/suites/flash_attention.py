"""FlashAttention-2 in Triton, forward and backward, at 16k tokens and hidden size 2048."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import HIDDEN, SEQLENS, TOKENS, Attention, compare
from benchmarks.correctness import assert_right, naive_one_by_one, random_qkv, random_ragged
from benchmarks.machine import Machine
from kernels import tuning
from kernels.flash_attention import flash_attention
from kernels.flash_attention.descriptors import candidates_here, why_not_here

HEADDIMS = (128, 256, 64)  # in order of importance: the time may not suffice for all

# flash-attn's test grid.
GRID_SEQLENS = (
    *((113, 203), (128, 217), (113, 211), (108, 256), (256, 512)),
    *((512, 256), (1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)),
)
GRID_HEADDIMS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
GRID_HEADS = ((6, 6), (6, 2), (6, 1))
HALVES = (torch.bfloat16, torch.float16)
SOME_SEQLENS = ((113, 203), (512, 256), (1023, 1024), (2048, 2048))
RAGGED = [(113, 0), (1, 217), (0, 5), (64, 64), (1023, 1024), (512, 300)]  # (queries, keys) of each sequence


class Case(NamedTuple):
    """One compilation of the kernels, and the lengths to run it with.

    Args:
        tiles: index of the candidate in `kernels.tuning`.
        layout: "padded"; "ragged", with the lengths of RAGGED; or "gaps": padded, with NaN between rows and heads.
    """

    dtype: torch.dtype
    heads: tuple[int, int]
    causal: bool
    local: bool
    headdim: int
    seqlens: tuple[tuple[int, int], ...] = SOME_SEQLENS
    softcap: float = 0.0
    tiles: int = 0
    layout: str = "padded"


def check(machine: Machine) -> int:
    """Compares the cases of this share with the naive method; returns how many."""
    checked = 0
    for case in machine.share(grid(machine)):
        with tiles(case):
            for seqlens in case.seqlens:
                check_one(case, seqlens, machine.device, batch=1 + checked % 2)
                checked += 1
    return checked


def check_one(case: Case, seqlens: tuple[int, int], device: str, batch: int) -> None:
    """Raises AssertionError where one case, forward or backward, is over the error budget."""
    options: dict[str, Any] = dict(causal=case.causal, softcap=case.softcap)
    options["window_size"] = (seqlens[1] // 3, seqlens[1] // 7) if case.local else (-1, -1)
    if case.layout == "ragged":
        qkv, ragged = random_ragged(RAGGED, case.heads, case.headdim, case.dtype, device)
        naive = partial(naive_one_by_one, ragged=ragged)
        assert_right(partial(flash_attention, ragged=ragged), qkv, naive=naive, **options)
    else:
        qkv = random_qkv(seqlens, case.heads, case.headdim, case.dtype, device, batch)
        assert_right(among_nan if case.layout == "gaps" else flash_attention, qkv, **options)


def among_nan(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The same with tensors that are views into larger ones full of NaN, which must not be read."""

    def inside(x: Tensor) -> Tensor:
        rows, heads, headdim = x.shape[1:]
        return F.pad(x, (0, 16, 0, 1, 0, 128), value=torch.nan)[:, :rows, :heads, :headdim]

    return flash_attention(inside(q), inside(k), inside(v), **options)


def tiles(case: Case) -> ExitStack:
    """The case's candidate while the stack is open; a kernel with fewer candidates takes its last one."""
    stack = ExitStack()
    if case.tiles:
        for kernel in tuning.KERNELS:
            found = candidates_here(kernel, case.headdim, case.dtype)
            config = found[min(case.tiles, len(found) - 1)]
            stack.enter_context(tuning.using(kernel, case.headdim, case.dtype, config))
    return stack


def grid(machine: Machine) -> Iterator[Case]:
    """What is timed, with every candidate; then flash-attn's grid, all of it with `whole_grid`, else a sample."""
    if machine.dry_run:
        yield Case(torch.float16, (4, 2), True, False, 16, ((40, 50),))
        yield Case(torch.float16, (4, 2), True, False, 16, ((40, 50),), layout="gaps")
        return
    for headdim, causal, candidate in itertools.product(HEADDIMS, (True, False), range(3)):
        yield Case(torch.bfloat16, (6, 6), causal, False, headdim, tiles=candidate)
    if machine.whole_grid:
        whole = itertools.product(HALVES, GRID_HEADS, (False, True), (False, True), GRID_HEADDIMS)
        for values, layout in itertools.product(whole, ("padded", "ragged")):
            yield Case(*values, GRID_SEQLENS if layout == "padded" else GRID_SEQLENS[:1], layout=layout)
    for i, headdim in enumerate((128, 64, 256, 96, 40, 192, 111, 59)):
        heads, flags = GRID_HEADS[(i + 1) % 3], (i % 2 == 0, i % 3 == 2)
        yield Case(HALVES[i % 2], heads, *flags, headdim, GRID_SEQLENS[i % 3 :: 3])
        yield Case(HALVES[1 - i % 2], heads, *flags, headdim, GRID_SEQLENS[:1], layout="ragged")
    yield Case(torch.bfloat16, (6, 2), True, False, 128, softcap=15.0)
    yield Case(torch.bfloat16, (6, 2), True, False, 64, layout="gaps")
    yield Case(torch.float16, (6, 1), False, True, 96, layout="gaps")
    for headdim in (64, 128):
        yield Case(torch.float32, (6, 2), True, False, headdim)


def measure(machine: Machine) -> Iterator[dict]:
    """Yields a row for each headdim, mask and length, forward and backward, with the tiles that tuning chose."""
    for headdim, causal in itertools.product(HEADDIMS[-1:] if machine.dry_run else HEADDIMS, (True, False)):
        ours: dict[str, Attention] = {"ours": partial(forward, causal=causal)}
        tma, tuned = not why_not_here(torch.bfloat16, headdim), set()
        for seqlen in SEQLENS[-1:] if machine.dry_run else SEQLENS:
            length = tuning.length_class(seqlen, seqlen)
            if length not in tuned and not machine.out_of_time():
                tune(machine, headdim, causal, seqlen)
                tuned.add(length)
            if not machine.out_of_time():
                for row in compare(machine, ours, headdim, causal, seqlen, backward=True):
                    yield row | tuning.chosen(headdim, torch.bfloat16, causal=causal, length=length, tma=tma)


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The kernels, as `compare` calls them."""
    return flash_attention(q, k, v, causal=causal)[0]


def tune(machine: Machine, headdim: int, causal: bool, seqlen: int) -> None:
    """Picks the fastest tiles for sequences of about this length; later calls with this headdim and mask use them."""
    batch, seqlen, nheads = (1, 32, 2) if machine.dry_run else (TOKENS // seqlen, seqlen, HIDDEN // headdim)
    dtype = torch.float16 if machine.dry_run else torch.bfloat16
    leaves = random_qkv((seqlen, seqlen), (nheads, nheads), headdim, dtype, machine.device, batch)
    q, k, v = (x.requires_grad_() for x in leaves)
    out = forward(q, k, v, causal)
    backward: Callable = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
    tuning.tune("forward", headdim, dtype, partial(forward, q, k, v, causal))
    tuning.tune("backward_kv", headdim, dtype, backward)
    tuning.tune("backward_q", headdim, dtype, backward)

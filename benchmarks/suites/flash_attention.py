"""FlashAttention-2 in Triton, forward and backward, at 16k tokens and hidden size 2048."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.attention import HIDDEN, SEQLENS, Attention, compare
from benchmarks.correctness import assert_right, random_qkv
from benchmarks.machine import Machine
from kernels import tuning
from kernels.flash_attention import flash_attention, flash_attn_func

HEADDIMS = (128, 256, 64)  # the first one first, should the time be short

# flash-attn's test grid.
GRID_SEQLENS = (
    *((113, 203), (128, 217), (113, 211), (108, 256), (256, 512)),
    *((512, 256), (1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)),
)
GRID_HEADDIMS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
GRID_HEADS = ((6, 6), (6, 2), (6, 1))


def check(machine: Machine) -> int:
    cases = list(grid(machine))
    for number, (dtype, heads, causal, local, headdim, seqlens) in enumerate(cases):
        window = (seqlens[1] // 3, seqlens[1] // 7) if local else (-1, -1)
        qkv = random_qkv(seqlens, heads, headdim, dtype, machine.device, batch=1 + number % 2)
        assert_right(flash_attention, qkv, causal=causal, window_size=window)
    return len(cases)


def grid(machine: Machine) -> Iterator[tuple]:
    """(dtype, heads, causal, local, headdim, seqlens): all of flash-attn's, or a walk through it in every dimension."""
    halves = (torch.bfloat16, torch.float16)
    whole = itertools.product(halves, GRID_HEADS, (False, True), (False, True), GRID_HEADDIMS, GRID_SEQLENS)
    if machine.dry_run:
        yield (torch.float16, (4, 2), True, False, 16, (40, 50))
    elif machine.whole_grid:
        yield from whole
    else:  # a compilation for each headdim, dtype and mask takes the time: ten of them, on four lengths each
        for i, headdim in enumerate((128, 64, 256, 128, 64, 96, 40, 128, 192, 111)):
            flags = (i % 2 == 0, i % 5 == 3)
            yield from ((halves[i // 3 % 2], GRID_HEADS[i % 3], *flags, headdim, s) for s in GRID_SEQLENS[i % 3 :: 3])


def measure(machine: Machine) -> Iterator[dict]:
    for headdim, causal in itertools.product(HEADDIMS[-1:] if machine.dry_run else HEADDIMS, (True, False)):
        ours: dict[str, Attention] = {"ours": partial(flash_attn_func, causal=causal)}
        if not machine.out_of_time():
            tune(machine, headdim, causal)
        for seqlen in SEQLENS[-1:] if machine.dry_run else SEQLENS:
            if not machine.out_of_time():
                for row in compare(machine, ours, headdim, causal, seqlen, backward=True):
                    yield row | tuning.chosen(headdim, torch.bfloat16)


def tune(machine: Machine, headdim: int, causal: bool) -> None:
    """Picks the fastest tiles for long sequences; all later calls with this headdim take them."""
    seqlen, nheads = (32, 2) if machine.dry_run else (SEQLENS[0], HIDDEN // headdim)
    dtype = torch.float16 if machine.dry_run else torch.bfloat16
    leaves = random_qkv((seqlen, seqlen), (nheads, nheads), headdim, dtype, machine.device)
    q, k, v = (x.requires_grad_() for x in leaves)
    out = flash_attn_func(q, k, v, causal=causal)
    backward = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
    tuning.tune("forward", headdim, dtype, partial(flash_attn_func, q, k, v, causal=causal))
    tuning.tune("backward_kv", headdim, dtype, backward)
    tuning.tune("backward_q", headdim, dtype, backward)

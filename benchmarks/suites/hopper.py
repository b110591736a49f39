"""FlashAttention-3's ladder in Gluon, rung by rung, forward, at 16k tokens and hidden size 2048 (Hopper only)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.attention import SEQLENS, Attention, compare
from benchmarks.correctness import assert_right, random_qkv
from benchmarks.machine import Machine
from kernels.hopper.launch import RUNGS, attention

GRID_SEQLENS = ((113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1023, 1024), (2048, 2048))
GRID_HEADS = ((6, 6), (6, 2), (6, 1))
TOGETHER = len(GRID_SEQLENS)


class Case(NamedTuple):
    """A comparison of one rung."""

    rung: str
    dtype: torch.dtype
    heads: tuple[int, int]
    causal: bool
    headdim: int
    seqlens: tuple[int, int]


class TimedCase(NamedTuple):
    """A row with all rungs."""

    headdim: int
    causal: bool
    seqlen: int


def why_not(machine: Machine) -> str:
    """Why there are no GPU figures here: it has to be a Hopper. A dry run takes the emulator."""
    if machine.dry_run or torch.cuda.get_device_capability() == (9, 0):
        return ""
    return "the kernels need a Hopper GPU (sm_90), and this is sm_{}{}".format(*torch.cuda.get_device_capability())


def subject(case: Case) -> str:
    """A wrong rung is not timed; the others are."""
    return case.rung


def checks(machine: Machine) -> Iterator[Case]:
    """Every combination for each rung, the last rung first: it is the one that counts."""
    if machine.dry_run:
        yield from (Case(rung, torch.float16, (2, 1), True, 64, (40, 50)) for rung in RUNGS)
        return
    halves, last_first = (torch.bfloat16, torch.float16), list(reversed(RUNGS))
    grid = itertools.product(halves, GRID_HEADS, (False, True), (64, 128), last_first, GRID_SEQLENS)
    for dtype, heads, causal, headdim, rung, seqlens in grid:
        yield Case(rung, dtype, heads, causal, headdim, seqlens)


def check(machine: Machine, case: Case) -> int:
    """Compares one case with the naive method; returns 1."""
    batch = 1 + GRID_SEQLENS.index(case.seqlens) % 2 if case.seqlens in GRID_SEQLENS else 1
    qkv = random_qkv(case.seqlens, case.heads, case.headdim, case.dtype, machine.device, batch)
    assert_right(partial(attention, rung=case.rung), qkv, backward=False, causal=case.causal)
    return 1


def timings(machine: Machine) -> Iterator[TimedCase]:
    """Each headdim, mask and length."""
    headdims, seqlens = ((64,), SEQLENS[-1:]) if machine.dry_run else ((128, 64), SEQLENS)
    yield from itertools.starmap(TimedCase, itertools.product(headdims, (True, False), seqlens))


def time(machine: Machine, case: TimedCase) -> Iterator[dict]:
    """Yields a row of the forward, the top of the ladder first: ratios are the first over the others."""
    ours: dict[str, Attention] = {
        rung: _attention(rung, case.causal) for rung in reversed(RUNGS) if rung not in machine.failed
    }
    if not ours:
        raise RuntimeError("no rung is right")
    yield from compare(machine, ours, *case)


def _attention(rung: str, causal: bool) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, rung=rung, causal=causal)[0]

    return run

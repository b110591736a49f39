"""FlashAttention-3's ladder in Gluon, rung by rung, forward, at 16k tokens and hidden size 2048 (Hopper only)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention import SEQLENS, Attention, compare
from benchmarks.correctness import assert_right, random_qkv
from benchmarks.machine import Machine
from kernels.hopper.launch import RUNGS, attention

GRID_SEQLENS = ((113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256), (1023, 1024), (2048, 2048))
GRID_HEADS = ((6, 6), (6, 2), (6, 1))


def check(machine: Machine) -> int:
    """Compares the cases of this share with the naive method; returns how many."""
    checked = 0
    cases = machine.share(enumerate(grid(machine)), together=len(GRID_SEQLENS))
    for number, (rung, dtype, heads, causal, headdim, seqlens) in cases:
        qkv = random_qkv(seqlens, heads, headdim, dtype, machine.device, batch=1 + number % 2)
        assert_right(partial(attention, rung=rung), qkv, backward=False, causal=causal)
        checked += 1
    return checked


def grid(machine: Machine) -> Iterator[tuple]:
    """(rung, dtype, heads, causal, headdim, seqlens); empty where the GPU is not a Hopper."""
    if machine.dry_run:
        yield from ((rung, torch.float16, (2, 1), True, 64, (40, 50)) for rung in RUNGS)
    elif is_hopper():
        halves = (torch.bfloat16, torch.float16)
        yield from itertools.product(RUNGS, halves, GRID_HEADS, (False, True), (64, 128), GRID_SEQLENS)


def measure(machine: Machine) -> Iterator[dict]:
    """Yields a row for each rung, headdim, mask and length, forward; none where the GPU is no Hopper."""
    if machine.dry_run or is_hopper():
        ladder = list(reversed(RUNGS))  # the top of the ladder first: ratios are the first over the others
        for headdim, causal in itertools.product((64,) if machine.dry_run else (128, 64), (True, False)):
            ours: dict[str, Attention] = {rung: _attention(rung, causal) for rung in ladder}
            for seqlen in SEQLENS[-1:] if machine.dry_run else SEQLENS:
                if not machine.out_of_time():
                    yield from compare(machine, ours, headdim, causal, seqlen)


def is_hopper() -> bool:
    """Whether the current GPU has compute capability 9.0."""
    return torch.cuda.get_device_capability() == (9, 0)


def _attention(rung: str, causal: bool) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, rung=rung, causal=causal)[0]

    return run

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
from benchmarks.correctness import assert_right, interpreter_fault, naive_one_by_one, random_qkv, random_ragged
from benchmarks.machine import Machine, Unable
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
TIMED_HEADS = (6, 6)  # of the checks of what is timed
HALVES = (torch.bfloat16, torch.float16)
SOME_SEQLENS = ((113, 203), (512, 256), (1023, 1024), (2048, 2048))
TUNING = 0.1  # seconds of the GPU for a candidate
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


def why_not(machine: Machine) -> str:
    """Why Triton's interpreter cannot run the kernels in a dry run here; "" on a GPU."""
    q = torch.zeros(1, 20, 1, 16)
    return interpreter_fault(partial(flash_attention, q, q, q, causal=True)) if machine.dry_run else ""


def subject(case: Case) -> str:
    """A candidate that is timed, as `tune` asks for it; or else the case itself, on which no timing rests."""
    if (case.dtype, case.heads) == (torch.bfloat16, TIMED_HEADS):
        return candidate(case.headdim, case.causal, case.tiles)
    return str(case)


def candidate(headdim: int, causal: bool, number: int) -> str:
    """The name of the tiles with this number in `kernels.tuning`."""
    return f"tiles {number} of headdim {headdim}, {'causal' if causal else 'full'}"


def check(machine: Machine, case: Case) -> int:
    """Compares a case, at all of its lengths, with the naive method; returns how many."""
    with tiles(case):
        for number, seqlens in enumerate(case.seqlens):
            check_one(case, seqlens, machine.device, batch=1 + number % 2)
    return len(case.seqlens)


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


def checks(machine: Machine) -> Iterator[Case]:
    """What is timed, with every candidate; then flash-attn's grid, all of it with `whole_grid`, else a sample."""
    if machine.dry_run:
        yield Case(torch.float16, (4, 2), True, False, 16, ((40, 50),))
        yield Case(torch.float16, (4, 2), True, False, 16, ((40, 50),), layout="gaps")
        return
    for headdim, causal, number in itertools.product(HEADDIMS, (True, False), range(3)):
        yield Case(torch.bfloat16, TIMED_HEADS, causal, False, headdim, tiles=number)
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


class TimedCase(NamedTuple):
    """A row of the forward and one of the backward."""

    headdim: int
    causal: bool
    seqlen: int


def timings(machine: Machine) -> Iterator[TimedCase]:
    """Each headdim, mask and length."""
    if machine.dry_run:
        yield from (TimedCase(HEADDIMS[-1], causal, SEQLENS[-1]) for causal in (True, False))
    else:
        yield from itertools.starmap(TimedCase, itertools.product(HEADDIMS, (True, False), SEQLENS))


def time(machine: Machine, case: TimedCase) -> Iterator[dict]:
    """Yields a row for the forward and one for the backward, with the tiles that are the fastest for this case."""
    headdim, causal, seqlen = case
    tma = not why_not_here(torch.bfloat16, headdim)
    kind = {"causal": causal, "length": tuning.length_class(seqlen, seqlen), "tma": tma}
    ours: dict[str, Attention] = {"ours": partial(forward, causal=causal)}
    with ExitStack() as stack:
        tried = tune(machine, case, stack)
        for row in compare(machine, ours, headdim, causal, seqlen, backward=True):
            yield row | tuning.chosen(headdim, torch.bfloat16, **kind) | {"tiles tried": tried}


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The kernels, as `compare` calls them."""
    return flash_attention(q, k, v, causal=causal)[0]


def tune(machine: Machine, case: TimedCase, stack: ExitStack) -> dict[str, dict[str, float | str]]:
    """Times each kernel's candidates, and uses the fastest while the stack is open.

    Returns:
        By kernel and tiles the milliseconds, or why there are none: a candidate that fails costs itself.

    Raises:
        RuntimeError: all candidates of a kernel fail.
    """
    if machine.dry_run:
        return {}  # the interpreter has one
    headdim, causal, seqlen = case
    shape = ((seqlen, seqlen), (HIDDEN // headdim,) * 2, headdim, torch.bfloat16, machine.device, TOKENS // seqlen)
    q, k, v = leaves = random_qkv(*shape)
    run: Callable[[], object] = partial(forward, q, k, v, causal)
    tried: dict[str, dict[str, float | str]] = {}
    for kernel in tuning.KERNELS:
        found = try_candidates(machine, kernel, case, run)
        tried[kernel] = {str(tuple(config)): result for config, result in found.items()}
        times = {config: result for config, result in found.items() if isinstance(result, float)}
        if not times:
            raise RuntimeError(f"all tiles of {kernel} fail: {tried[kernel]}")
        stack.enter_context(tuning.using(kernel, headdim, torch.bfloat16, min(times, key=times.__getitem__)))
        if kernel == "forward":  # the graph is made with the forward that was chosen
            q, k, v = leaves = [x.requires_grad_() for x in leaves]
            out = forward(q, k, v, causal)
            run = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
    return tried


def try_candidates(
    machine: Machine, kernel: str, case: TimedCase, run: Callable[[], object]
) -> dict[tuning.Config, float | str]:
    """The milliseconds of a call with each candidate for a kernel, or why there are none."""
    found: dict[tuning.Config, float | str] = {}
    for number, config in enumerate(candidates_here(kernel, case.headdim, torch.bfloat16)):
        name = candidate(case.headdim, case.causal, number)
        if name in machine.failed:
            found[config] = f"its check failed: {machine.failed[name]}"
            continue
        try:
            with tuning.using(kernel, case.headdim, torch.bfloat16, config):
                timings = machine.attempt(f"{kernel}, {name}, {case}", partial(machine.time, {kernel: run}, TUNING))
            found[config] = timings[kernel].median
        except Unable as error:
            found[config] = str(error)
    return found

"""Milliseconds of functions that are called in turns: on a GPU between events, with the host ahead of it.

A call of a Triton kernel takes the host about 0.1 ms. A GPU that is done earlier waits for the next launch, and events
then measure the host. So the GPU sleeps before each call until all of the call's kernels are queued: `late` counts the
calls where this did not succeed, such as those of a function that waits for the GPU itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

MAX_ROUNDS = 50
MAX_SLEEP = 0.02  # seconds: a call that takes the host longer is timed as it is
TRIES = 4  # to find a sleep that is long enough
CYCLES = 2e9  # a second's of the GPU, rounded up: it may sleep longer

Function = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, and the bounds of the middle 60%.

    Args:
        rounds: how often it was called.
        late: in how many of them the GPU had to wait for the host. They do not count, unless they are most of them.
    """

    median: float
    low: float
    high: float
    rounds: int
    late: int = 0


def on_cpu(functions: Mapping[str, Function]) -> dict[str, Timing]:
    """One round by the host's clock, after a call of each to warm up: for dry runs."""
    for function in functions.values():
        function()
    found = {}
    for name, function in functions.items():
        start = time.perf_counter()
        function()
        found[name] = timing([(time.perf_counter() - start) * 1000], late=[False])
    return found


def on_gpu(
    functions: Mapping[str, Function],
    seconds: float,
    larger_than_cache: Tensor,
    watch: AbstractContextManager,
) -> dict[str, Timing]:
    """Times functions in turns, so that all see the same GPU; each finds the L2 cache full of other data.

    Args:
        functions: by name, on the current stream; each is called a few times before it is timed.
        seconds: of the GPU, for all together.
        larger_than_cache: is overwritten before each call.
        watch: is open while the calls that count are running.
    """
    for function in functions.values():
        function()  # compiles, and fills caches
    sleeps = {name: sleep_before(function, larger_than_cache) for name, function in functions.items()}
    once = sum(_queue(function, larger_than_cache, 0).milliseconds() / 1000 for function in functions.values())
    rounds = max(5, min(MAX_ROUNDS, int(seconds / max(once + sum(sleeps.values()), 1e-4))))
    with watch:
        turns = [
            (name, _queue(function, larger_than_cache, sleeps[name]))
            for _ in range(rounds)
            for name, function in functions.items()
        ]
        torch.cuda.synchronize()  # read at the end, so that the GPU does not idle between two calls
    calls = {name: [call for other, call in turns if other == name] for name in functions}
    return {
        name: timing([call.milliseconds() for call in found], [call.late for call in found])
        for name, found in calls.items()
    }


def timing(milliseconds: list[float], late: list[bool]) -> Timing:
    """The figures of a function's calls; of those in time alone, where they are at least half."""
    in_time = [value for value, was_late in zip(milliseconds, late, strict=True) if not was_late]
    kept = in_time if 2 * len(in_time) >= len(milliseconds) else milliseconds
    low, high = (kept[0], kept[0]) if len(kept) == 1 else (quantiles(kept, n=5)[0], quantiles(kept, n=5)[-1])
    return Timing(median(kept), low, high, len(milliseconds), sum(late))


def sleep_before(function: Function, larger_than_cache: Tensor) -> float:
    """How many seconds the GPU has to sleep before a call, so that the host has queued all of it by then."""
    sleep = 0.0
    for _ in range(TRIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        late = _queue(function, larger_than_cache, sleep).late
        host = time.perf_counter() - start
        if not late or host > MAX_SLEEP:
            break
        sleep = min(MAX_SLEEP, 2 * max(host, sleep))
    return sleep if not late else 0.0  # it waits for the GPU itself, however long that sleeps


@dataclass(frozen=True)
class _Call:
    before: torch.cuda.Event
    after: torch.cuda.Event
    late: bool

    def milliseconds(self) -> float:
        self.after.synchronize()
        return self.before.elapsed_time(self.after)


def _queue(function: Function, larger_than_cache: Tensor, sleep: float) -> _Call:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if sleep:
        torch.cuda._sleep(int(sleep * CYCLES))
    larger_than_cache.zero_()
    before.record()
    function()
    after.record()
    return _Call(before, after, late=before.query())  # had the GPU come this far before all was queued?

"""Where the time and the memory of a generation go, phase by phase, and what the figures suggest.

    with profile() as measured:
        generator.generate(prompt_ids)
    print(measured)

The code that is measured names its phases: `with phase("decode", tokens=1, reads=lambda: Reads(…)):`. Outside `profile`
that costs about a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch

from minillm.measure.memory import format_bytes, record_peak


class Reads(NamedTuple):
    """The bytes that a call reads at least: weights, and its part of the cache."""

    weights: int
    cache: int = 0


@dataclass
class Phase:
    """What was measured of one phase, over all its calls.

    Attributes:
        tokens: new tokens, all calls and rows together.
        reads: of each call, the bytes that it reads at least.
        seconds: of each call; empty without `log_latency`.
        peak_bytes: the most that a call allocated at one time, beyond what was there; 0 without `log_memory`.
    """

    tokens: int = 0
    reads: list[Reads] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens over seconds; 0 without `log_latency`."""
        return self.tokens / sum(self.seconds) if self.seconds else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the median call, counting only `reads`."""
        return median(sum(n) / s for n, s in zip(self.reads, self.seconds, strict=True)) if self.seconds else 0.0


class Profile:
    """What `profile` measured: phases by name, and suggestions.

    Args:
        log_latency, log_memory: what to measure.
        device: where the work runs.
    """

    def __init__(self, log_latency: bool, log_memory: bool, device: torch.device | str):
        self.log_latency, self.log_memory, self.device = log_latency, log_memory, torch.device(device)
        self.phases: dict[str, Phase] = {}

    def suggestions(self, bandwidth: float | None = None) -> list[str]:
        """Suggestions that follow from the figures; empty where nothing was timed.

        Args:
            bandwidth: bytes/s at which this machine reads as much as a decode step does; left out, it is measured
                (a tenth of a second).
        """
        timed = {name: phase for name, phase in self.phases.items() if phase.seconds}
        if not timed:
            return []
        advice = [_largest_share(timed)]
        if "decode" in timed:
            decode = timed["decode"]
            advice.append(_reading(decode, bandwidth or read_bandwidth(sum(decode.reads[-1]), self.device)))
            advice += _slowing_down(decode)
        return advice

    def __str__(self) -> str:
        lines = [f"{'phase':10} {'calls':>6} {'tokens':>7} {'seconds':>9} {'tokens/s':>9} {'GB/s':>6} {'peak':>10}"]
        for name, phase in self.phases.items():
            time_columns = f"{'–':>9} {'–':>9} {'–':>6}"
            if phase.seconds:
                rates = f"{phase.tokens_per_second:9.1f} {phase.bandwidth / 1e9:6.1f}"
                time_columns = f"{sum(phase.seconds):9.4f} {rates}"
            peak = format_bytes(phase.peak_bytes) if self.log_memory else "–"
            lines.append(f"{name:10} {len(phase.reads):6} {phase.tokens:7} {time_columns} {peak:>10}")
        if self.log_latency and self.log_memory:
            lines.append("Recording the memory took time too: for true times, log one of the two.")
        return "\n".join(lines + [f"- {advice}" for advice in self.suggestions()])

    @contextmanager
    def _measure(self, name: str, tokens: int, reads: Reads) -> Iterator[None]:
        phase = self.phases.setdefault(name, Phase())
        recording = record_peak(self.device) if self.log_memory else nullcontext(list[int]())
        with recording as peak:
            start = self._now()
            yield
            seconds = self._now() - start
        phase.tokens += tokens
        phase.reads.append(reads)
        if self.log_latency:
            phase.seconds.append(seconds)
        phase.peak_bytes = max(phase.peak_bytes, *peak, 0)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a launch returns before its kernel has run
        return time.perf_counter()


_current: ContextVar[Profile | None] = ContextVar("profile", default=None)
_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def profile(
    log_latency: bool = True, log_memory: bool = False, device: torch.device | str = "cpu"
) -> Iterator[Profile]:
    """Measures the phases that run in the block.

    Args:
        log_latency: seconds of each call.
        log_memory: peak of what each phase allocates, to the byte. It slows the code down, so it is off.
        device: where the work runs.

    Example:
        >>> with profile() as report:
        ...     with phase("decode", tokens=1, reads=lambda: Reads(weights=4_000_000)):
        ...         pass
        >>> report.phases["decode"].tokens, report.phases["decode"].reads
        (1, [Reads(weights=4000000, cache=0)])
    """
    measured = Profile(log_latency, log_memory, device)
    token = _current.set(measured)
    try:
        yield measured
    finally:
        _current.reset(token)


def phase(name: str, tokens: int, reads: Callable[[], Reads]) -> AbstractContextManager[None]:
    """Names a piece of work, for `profile`; does nothing where no profile is on.

    Args:
        name: such as "prefill" or "decode".
        tokens: new tokens that it takes in.
        reads: gives the bytes that it reads at least; called only where a profile is on.
    """
    current = _current.get()
    return _NOTHING if current is None else current._measure(name, tokens, reads())


def read_bandwidth(nbytes: int, device: torch.device | str = "cpu") -> float:
    """How fast this machine reads so many bytes again and again, in bytes/s: the best of many sums over them.

    As many bytes as the measured code reads: what fits the processor's cache is read from there, many times as fast.
    """
    numbers = torch.ones(max(1, nbytes // 4), device=device)
    clock = Profile(True, False, device)
    for _ in range(max(6, min(50, 2**30 // nbytes))):
        with clock._measure("read", 0, Reads(numbers.nbytes)):
            numbers.sum()
    return numbers.nbytes / min(clock.phases["read"].seconds)


def _largest_share(phases: dict[str, Phase]) -> str:
    seconds = {name: sum(phase.seconds) for name, phase in phases.items()}
    name = max(seconds, key=lambda name: seconds[name])
    share = seconds[name] / sum(seconds.values())
    cure = {
        "prefill": "shorten the prompt, or keep the cache of a prefix that comes again",
        "decode": "a batch shares each step's reading of the weights",
    }.get(name, "look there first")
    return f"{name} takes {share:.0%} of the time: {cure}"


def _reading(decode: Phase, bandwidth: float) -> str:
    share = decode.bandwidth / bandwidth
    weights, cache = decode.reads[-1]
    size, rate = format_bytes(weights + cache), f"{decode.bandwidth / 1e9:.1f} GB/s"
    found = f"decode reads the {size} of a step at {rate}, of the {bandwidth / 1e9:.1f} GB/s that this machine reaches"
    if share <= 0.6:
        return f"{found}: memory is not the limit, overhead is (a larger batch or a larger model hides it)"
    part, cure = ("weights", "8 bits for each") if weights >= cache else ("cache", "fewer KV heads, a shorter context")
    most = max(weights, cache) / (weights + cache)
    return f"{found}: memory is the limit, only fewer bytes help, and {most:.0%} of them are {part} ({cure})"


def _slowing_down(decode: Phase) -> list[str]:
    """Compares the first quarter of the steps with the last, where there are enough to tell."""
    quarter = len(decode.seconds) // 4
    if quarter < 8:
        return []
    first, last = median(decode.seconds[:quarter]), median(decode.seconds[-quarter:])
    if last < 1.2 * first:
        return []
    before, after = (median(map(sum, reads)) for reads in (decode.reads[:quarter], decode.reads[-quarter:]))
    grew = f"a step took {first * 1e3:.2f} ms at first and {last * 1e3:.2f} at the end, {last / first - 1:.0%} more"
    if after / before - 1 < (last / first - 1) / 2:
        return [f"{grew}, and read only {after / before - 1:.0%} more: look for what else slows it down"]
    return [f"{grew}, and read {after / before - 1:.0%} more: the cache grows (fewer KV heads, a shorter context)"]

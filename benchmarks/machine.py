"""The machine of a benchmark: its description, and the timing of functions on it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "flash-attn", "flashinfer-python")
MAX_ROUNDS = 50
Case = TypeVar("Case")
SECONDS_A_CASE = 1.0  # for all functions of a comparison together


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median, and the bounds of the middle 60%."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass
class Machine:
    """Where suites run.

    Args:
        dry_run: run everything in the interpreter, on the CPU, at tiny sizes: no figure means anything.
        seconds: the limit after which no case is begun.
        whole_grid: check all of a suite's grid, without regard to time.
        part: (number, parts): which part of the checks this process runs.
        left_out: the number of its checks that were not begun, for lack of time.
    """

    dry_run: bool
    seconds: float = 480.0
    whole_grid: bool = False
    part: tuple[int, int] = (0, 1)
    left_out: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        """ "cuda", or "cpu" in a dry run."""
        return "cpu" if self.dry_run else "cuda"

    def out_of_time(self) -> bool:
        """Whether a suite should stop before its next case."""
        return time.monotonic() > self.started + self.seconds

    def share(self, cases: Iterable[Case], together: int = 1) -> Iterator[Case]:
        """This process's part of the checks, until its time is over.

        Args:
            cases: all of them, the most important ones first.
            together: the number of consecutive cases that share a compilation, and go to the same process.
        """
        number, parts = self.part
        for i, case in enumerate(cases):
            if i // together % parts == number:
                if self.out_of_time():
                    self.left_out += 1
                else:
                    yield case

    def describe(self) -> dict[str, str]:
        """Device, driver, versions and date: a part of every stored result."""
        found = {"device": platform.processor() or platform.machine(), "driver": "none"}
        if not self.dry_run:
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found = {"device": torch.cuda.get_device_name(), "driver": _first_line(query)}
        versions = {name: _version(name) for name in PACKAGES}
        cuda = {"cuda": str(torch.version.cuda), "python": platform.python_version()}
        return {**found, **versions, **cuda, "date": datetime.now(UTC).isoformat(timespec="seconds")}

    def time(self, functions: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        """Times functions in turns, so that all see the same machine; the L2 cache is flushed before each call.

        Args:
            functions: by name; each is called before it is timed.

        Returns:
            The timings by name.
        """
        for function in functions.values():
            function()  # compiles, and fills caches
        once = sum(self._start(function)() for function in functions.values()) / 1000
        rounds = 1 if self.dry_run else max(5, min(MAX_ROUNDS, int(SECONDS_A_CASE / max(once, 1e-4))))
        turns = [(name, self._start(function)) for _ in range(rounds) for name, function in functions.items()]
        times: dict[str, list[float]] = {name: [] for name in functions}
        for name, milliseconds in turns:  # read at the end, so that the GPU does not idle between two calls
            times[name].append(milliseconds())
        return {name: _timing(found) for name, found in times.items()}

    def _start(self, function: Callable[[], object]) -> Callable[[], float]:
        """Calls a function, and returns a function that waits for its end and gives its milliseconds."""
        if self.dry_run:
            start = time.perf_counter()
            function()
            taken = (time.perf_counter() - start) * 1000
            return lambda: taken
        self._larger_than_cache.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()

        def milliseconds() -> float:
            after.synchronize()
            return before.elapsed_time(after)

        return milliseconds

    @cached_property
    def _larger_than_cache(self) -> torch.Tensor:
        return torch.empty(256 * 2**20, dtype=torch.uint8, device=self.device)

    @cached_property
    def peak_flops(self) -> float:
        """FLOP/s of a large bf16 matrix product on random data: the 100% of "share of matmul peak"."""
        n = 64 if self.dry_run else 8192
        a, b = torch.randn(2, n, n, device=self.device).to(torch.float32 if self.dry_run else torch.bfloat16)
        return 2 * n**3 / self.time({"matmul": lambda: a @ b})["matmul"].median * 1000

    @cached_property
    def peak_bandwidth(self) -> float:
        """Bytes/s of a copy within GPU memory, reads and writes counted."""
        source = torch.empty(2**16 if self.dry_run else 2**32, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.time({"copy": lambda: target.copy_(source)})["copy"].median * 1000


def _timing(found: list[float]) -> Timing:
    low, high = (found[0], found[0]) if len(found) == 1 else (quantiles(found, n=5)[0], quantiles(found, n=5)[-1])
    return Timing(median(found), low, high, len(found))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with "+changes" where files differ from it; "unknown" in a copy without git."""
    head = _first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _first_line(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+changes" if changed not in ("", "unknown") else head


def _first_line(command: list[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.splitlines()[0].strip() if answer.strip() else ""

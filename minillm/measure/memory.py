"""The bytes that a call allocates: the peak, and apart from it the largest single buffer.

An attention that materialises its scores and one that works tile by tile can have peaks that look alike
on short inputs. The largest single buffer tells them apart: 16 heads x N x N floats, or one tile.

What is counted, on the CPU and on CUDA alike, is every buffer that PyTorch's allocator hands out during the
call, at the size that was asked for. So:

- a view or an in-place operation counts nothing, for it asks for no buffer;
- scratch inside a fused operator (SDPA's, say) counts, for it comes from the same allocator;
- a temporary counts until it is freed: it stays in the peak and leaves the live count;
- a Python number that an operator wraps into a tensor counts, with its 8 bytes;
- freeing a buffer that is older than the call gives no credit;
- memory from elsewhere does not count: NumPy and Python objects, and what MKL or oneDNN take for themselves.

On the CPU the allocator's events come from PyTorch's profiler, for the calling thread. They are exact, not
samples of the process's size, so they repeat to the byte (scratch that an operator cuts up by threads
depends on how many there are). A ``TorchDispatchMode`` that watches storages would be lighter, but cannot see
inside a C++ operator. No other profile may run on the thread, and only one thread may measure at a time.
The profiler keeps some KiB for each operator: a loop of many calls can empty it in between, `empty_recordings`.

On CUDA they come from the caching allocator's history, for this process and one device; a history that you
record yourself is lost. Call the function once before you measure it: the first matrix product also
allocates cuBLAS's workspace, some MiB, and keeps it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.autograd.profiler import profile
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class AllocatedBytes:
    """What one call allocated; every size in bytes.

    Attributes:
        result: what the function returned.
        peak_bytes: the most that was live at one time, of the buffers that the call itself allocated.
        largest_bytes: the largest single buffer that the call allocated, however short its life.
        largest_temporary_bytes: the largest one that was freed again: of an attention, its score buffer.
        kept_bytes: what was still live when the call returned: the result, and all that it keeps alive
            (the tensors autograd saved for the backward, for one).
        allocations: how many buffers were allocated.
        device: where.
    """

    result: Any = field(repr=False, compare=False)
    peak_bytes: int
    largest_bytes: int
    largest_temporary_bytes: int
    kept_bytes: int
    allocations: int
    device: str

    @property
    def temporary_bytes(self) -> int:
        """The peak beyond what the result keeps: the working memory that the call needed and gave back."""
        return self.peak_bytes - self.kept_bytes

    def __str__(self) -> str:
        return (
            f"peak {format_bytes(self.peak_bytes)} on {self.device} in {self.allocations} buffers, "
            f"the largest {format_bytes(self.largest_bytes)}; the result keeps {format_bytes(self.kept_bytes)}"
        )


def measure_memory(
    function: Callable[..., Any], *args: Any, device: torch.device | str | None = None, **kwargs: Any
) -> AllocatedBytes:
    """Calls a function and counts the bytes that it allocates, exactly. The module's docstring has the rules.

    Calls may be nested: the outer count then includes what the inner call allocated.

    Args:
        function: called once, as ``function(*args, **kwargs)``. A function that itself takes ``device=``
            needs a lambda round it.
        device: "cpu" or a CUDA device. None: the device of the first CUDA tensor among the arguments, else
            the CPU. Say it when the tensors are not arguments but captured by the function.

    Returns:
        `AllocatedBytes`, with the function's result in it.

    Raises:
        TypeError: function is not callable.
        ValueError: the device is neither a CPU nor a CUDA device.
        RuntimeError: another profile is running on this thread (CPU), or the allocator keeps no history (CUDA).

    Example:
        >>> x = torch.zeros(1000, 1000)
        >>> report = measure_memory(lambda: (x + x).sum())
        >>> report.largest_bytes, report.kept_bytes
        (4000000, 4)
    """
    if not callable(function):
        raise TypeError(f"function is {type(function).__name__}, not something that can be called")
    place = _place(device, (args, kwargs))
    with _recording(_recorder(place)) as events:
        result = function(*args, **kwargs)
    return AllocatedBytes(result, *_account(events), device=str(place))


@contextmanager
def record_peak(device: torch.device | str = "cpu") -> Iterator[list[int]]:
    """Like `measure_memory`, for a block of code: at its end the list holds one number, the peak in bytes.

    Args:
        device: "cpu" or a CUDA device.

    Raises:
        ValueError, RuntimeError: as `measure_memory`.

    Example:
        >>> with record_peak() as peak:
        ...     x = torch.zeros(1000)
        >>> peak
        [4000]
    """
    peak: list[int] = []
    with _recording(_recorder(_place(device, ()))) as events:
        yield peak
    peak.append(_account(events)[0])


def empty_recordings() -> None:
    """Hands on what was recorded so far, so that a long loop under measurement needs no more memory than a short one.

    The one that calls torch calls this, as after every 10,000 calls (some 80 MiB). A mode that counts them for every
    measurement would have torch.compile compile again in each.
    """
    for recorder in _recorders.values():
        if recorder.logs:
            _cut(recorder, go_on=True)


def format_bytes(size: float) -> str:
    """A size to be read: binary units (1 MiB = 2**20 bytes), two decimals at most.

    Args:
        size: bytes; may be negative, as a difference can be.

    Returns:
        Such as "4 MiB", "80.5 KiB", "1000 B".

    Example:
        >>> format_bytes(80.5 * 1024)
        '80.5 KiB'
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.2f}".rstrip("0").rstrip(".") + f" {units[0]}"


Event = tuple[int, int]  # (address, size in bytes): a positive size was allocated there, a negative one freed


def _account(events: Iterable[Event]) -> tuple[int, int, int, int, int]:
    """Goes through the events in the order of time; returns the numbers of `AllocatedBytes`, in its order."""
    live: dict[int, int] = {}
    now = peak = largest = largest_freed = allocations = 0
    for address, size in events:
        freed = live.pop(address, 0)  # nothing there: the buffer is older than the call, and gives no credit
        now, largest_freed = now - freed, max(largest_freed, freed)
        if size > 0:
            live[address] = size
            now += size
            allocations += 1
        peak, largest = max(peak, now), max(largest, size)
    return peak, largest, largest_freed, now, allocations


def _place(device: torch.device | str | None, arguments: Any) -> torch.device:
    if device is None:
        tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor) and leaf.is_cuda)
        return next((tensor.device for tensor in tensors), torch.device("cpu"))
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(place)!r}; memory is measured on 'cpu' or on a 'cuda' device")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(place)!r}, but this machine has no CUDA device; use 'cpu'")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


class _Recorder(Protocol):
    """Collects the allocator's events of one device between start and stop."""

    logs: list[list[Event]]  # one for each measurement under way, outermost first

    def start(self) -> None: ...

    def stop(self) -> list[Event]: ...


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[list[Event]]:
    """Records into a list that is complete at the exit; a measurement around this one gets the same events too.

    A recording cannot be read while it runs, so it is cut where a measurement begins and where one ends.
    """
    log: list[Event] = []
    if recorder.logs:
        _cut(recorder, go_on=True)
    else:
        recorder.start()
    recorder.logs.append(log)
    try:
        yield log
    finally:
        try:
            _cut(recorder, go_on=len(recorder.logs) > 1)
        finally:
            recorder.logs.pop()


def _cut(recorder: _Recorder, go_on: bool) -> None:
    """Hands on what was recorded. No garbage is collected meanwhile, for a release would be missed."""
    collects = gc.isenabled()
    gc.disable()
    try:
        events = recorder.stop()
        for log in recorder.logs:
            log.extend(events)
        if go_on:
            recorder.start()
    finally:
        if collects:
            gc.enable()


class _CpuRecorder:
    """The CPU allocator's events, out of PyTorch's profiler."""

    def __init__(self) -> None:
        self.logs: list[list[Event]] = []

    def start(self) -> None:
        if torch.autograd._profiler_enabled():
            raise RuntimeError("measure_memory uses PyTorch's profiler, and a profile is already running here")
        older = torch.empty(1)
        self._profile = profile(profile_memory=True)
        with _standard_error_shut():
            self._profile.__enter__()
            # The allocator warns once, when a buffer older than the profile is freed: here, where stderr is shut.
            del older

    def stop(self) -> list[Event]:
        with _standard_error_shut():
            self._profile.__exit__(None, None, None)
        assert self._profile.kineto_results is not None
        found = _allocations(self._profile.kineto_results.experimental_event_tree())
        return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


def _allocations(nodes: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(time in ns, address, size) of every CPU allocation and release in the profiler's tree of operators."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        name, extra = node.typed
        if name.name == "Allocation" and extra.device.type == "cpu":
            yield node.start_time_ns, extra.ptr, extra.alloc_size


@contextmanager
def _standard_error_shut() -> Iterator[None]:
    """Keeps the profiler's dated lines ("USDT:2026-…") out of a lesson's output: C++ writes them to descriptor 2."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


class _CudaRecorder:
    """The CUDA caching allocator's events, out of its history; one recorder for each device."""

    def __init__(self, device: torch.device) -> None:
        self.logs: list[list[Event]] = []
        self.device = device

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        self._before = self._allocated()
        torch.cuda.memory._record_memory_history(enabled="all", context=None)

    def stop(self) -> list[Event]:
        torch.cuda.synchronize(self.device)
        events = _history_events(torch.cuda.memory._snapshot(self.device)["device_traces"][self.device.index])
        torch.cuda.memory._record_memory_history(enabled=None)
        counted, made = sum(size > 0 for _, size in events), self._allocated() - self._before
        if counted != made:
            raise RuntimeError(f"the CUDA allocator made {made} allocations and its history shows {counted}")
        return events

    def _allocated(self) -> int:
        return torch.cuda.memory_stats(self.device).get("allocation.all.allocated", 0)


def _history_events(history: Iterable[dict[str, Any]]) -> list[Event]:
    """The allocations and releases of buffers in a CUDA allocator's history, without its segments and snapshots."""
    sign = {"alloc": 1, "free_requested": -1}
    return [(entry["addr"], sign[entry["action"]] * entry["size"]) for entry in history if entry["action"] in sign]


_recorders: dict[str, _Recorder] = {}


def _recorder(place: torch.device) -> _Recorder:
    if str(place) not in _recorders:
        _recorders[str(place)] = _CpuRecorder() if place.type == "cpu" else _CudaRecorder(place)
    return _recorders[str(place)]

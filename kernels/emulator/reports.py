"""The reports: exceptions for the faults that the emulator finds in a kernel.

A report names the buffer or barrier, the operations with their source lines and the warps that issued them, and a cure.
The first report ends the run.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

EMULATED = "__emulated__"  # a name in the globals of every function that the emulator runs: marks a kernel's frames


class Report(Exception):
    """A fault in a kernel: wrong on the GPU, at least in some interleaving.

    Args:
        what: one line: what happened, to which buffer or barrier.
        events: the operations in conflict, in the order of the run.
        cure: one line: what would repair it.
    """

    kind = "fault"

    def __init__(self, what: str, events: list[Event] | None = None, cure: str = ""):
        self.what, self.events, self.cure = what, events or [], cure
        lines = [f"{self.kind}: {what}", *(f"  {event}" for event in self.events), *([f"  {cure}"] if cure else [])]
        super().__init__("\n".join(lines))


class Race(Report):
    """Two operations touch the same memory or registers, one writes, and nothing orders them."""

    kind = "race"


class MissingFence(Report):
    """Threads and an engine touch the same shared memory in order, but without `fence_async_shared` between them."""

    kind = "missing fence"


class Deadlock(Report):
    """No partition can go on."""

    kind = "deadlock"


class WrongBytes(Report):
    """A barrier expects more or fewer bytes than its copies bring."""

    kind = "wrong bytes"


class WrongArrivals(Report):
    """A barrier got an arrival too many: its phase is no longer the one that the waits assume."""

    kind = "wrong arrivals"


class BadBarrier(Report):
    """A barrier used before its init or after its invalidate, initialised twice, or a phase that is neither 0 nor 1."""

    kind = "bad barrier"


class UseAfterFree(Report):
    """Shared memory used after it was freed, or still in use when the program ends."""

    kind = "use after free"


class Unwritten(Report):
    """A read of shared memory that was never written."""

    kind = "unwritten"


class OutOfBounds(Report):
    """A pointer outside its tensor, a slot outside its buffer, or more shared memory than a block has."""

    kind = "out of bounds"


class BadLayout(Report):
    """Layouts, shapes or types that do not fit together: the compiler or the GPU would refuse them."""

    kind = "bad layout"


class FailedAssert(Report):
    """`gl.static_assert` or `gl.device_assert` does not hold."""

    kind = "failed assert"


class NotModelled(NotImplementedError):
    """The kernel uses a part of Gluon that the emulator does not model: names it, and the line."""

    def __init__(self, what: str):
        place = here()
        super().__init__(f"{what}\n  {place}: {place.code}" if place.frames else what)


@dataclass(frozen=True)
class Place:
    """A line of a kernel and its callers, innermost first: (file, line, function)."""

    frames: tuple[tuple[str, int, str], ...]

    @property
    def code(self) -> str:
        """The text of the line."""
        if not self.frames:
            return ""
        path, line, _ = self.frames[0]
        return linecache.getline(path, line).strip()

    def __str__(self) -> str:
        if not self.frames:
            return "(no source)"
        (path, line, function), *callers = self.frames
        via = "".join(f", called at line {line}" for _, line, _ in callers[:1])
        return f"{Path(path).name}:{line} in {function}{via}"


def here() -> Place:
    """The kernel's line that is running."""
    return Place(tuple((f.f_code.co_filename, f.f_lineno, f.f_code.co_name) for f in _kernel_frames()))


def assigned_name(default: str) -> str:
    """The target of the assignment that is running: `k_smem` in `k_smem = gl.allocate_shared_memory(…)`.

    Where the function only returns it, the name in the caller.
    """
    for frame in _kernel_frames():
        target, equals, _ = linecache.getline(frame.f_code.co_filename, frame.f_lineno).partition("=")
        name = target.split(":")[0].strip()
        if equals and name.isidentifier() and f"return {name}\n" not in _source(frame.f_code):
            return name
    return default


@cache
def _source(code: CodeType) -> str:
    return inspect.getsource(code)


def _kernel_frames():
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if EMULATED in frame.f_globals:
            yield frame
        frame = frame.f_back


@dataclass(frozen=True)
class Event:
    """One operation: what it does, its source line, and the warps that issued it."""

    what: str
    place: Place
    partition: str

    def __str__(self) -> str:
        return f"{self.what}, {self.place} [{self.partition}]: {self.place.code}"

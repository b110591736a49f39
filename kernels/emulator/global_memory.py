"""Global memory: which accesses of one program touch the same bytes, and whether anything orders them.

Three orders differ from shared memory's. A copy out of shared memory (TMA) writes later than `store_wait` returns: it
waits for the reads alone. `fence_async_shared` orders shared memory only, so that nothing in Gluon orders a thread's
write before a copy engine's access. And threads of one partition meet only at `gl.barrier` or an mbarrier.

Source:
    PTX ISA, "cp.async.bulk.wait_group" (`.read`) and "Memory Consistency Model: Proxies".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels.emulator.memory import Access
from kernels.emulator.reports import MissingFence, Race

READ_ONLY = (
    "tma.store_wait waits until the copies have read shared memory, not until they have written: "
    "store_wait(…, read_only=False) does (triton 3.8 on), and so does the end of the kernel"
)
NO_FENCE = "fence_async_shared orders shared memory alone: read it by gl.load, or copy it in another kernel"
MEET = "threads of the same warps that touch one element must meet at gl.barrier() between the two"
ORDER = "the second must come after a wait for a barrier at which the first's warps arrive afterwards"


@dataclass(eq=False)
class Touch:
    """One access to global memory.

    Args:
        first, last: the lowest and the highest element.
        elements: gives all elements, as offsets.
        threads: which thread has which element (its layout, its offsets); None for an engine.
        meeting: how often the threads of the partition had met before.
    """

    name: str
    access: Access
    first: int
    last: int
    elements: Callable[[], torch.Tensor]
    threads: tuple[Any, torch.Tensor] | None = None
    meeting: int = 0

    def overlaps(self, other: Touch) -> bool:
        """Whether both touch an element in common."""
        if self.last < other.first or other.last < self.first:
            return False
        return bool(torch.isin(self.elements(), other.elements()).any())

    def same_threads(self, other: Touch) -> bool:
        """Whether each thread touches what it has touched before."""
        (layout, offsets), (their_layout, their_offsets) = self.threads, other.threads  # type: ignore[misc]
        return offsets.ndim > 0 and layout == their_layout and torch.equal(offsets, their_offsets)


class GlobalMemory:
    """The accesses of one program to global memory."""

    def __init__(self) -> None:
        self.reads: dict[int, list[Touch]] = defaultdict(list)
        self.writes: dict[int, list[Touch]] = defaultdict(list)

    def touch(self, tensor: torch.Tensor, touch: Touch) -> None:
        """Records an access.

        Raises:
            Race, MissingFence: where an earlier access of this program touches the same elements, one of them writes,
                and nothing orders them.
        """
        memory = tensor.untyped_storage().data_ptr()
        earlier = self.writes[memory] + (self.reads[memory] if touch.access.write else [])
        for other in earlier:
            fault = _fault(other, touch)
            if fault and touch.overlaps(other):
                raise fault
        (self.writes if touch.access.write else self.reads)[memory].append(touch)


def _fault(earlier: Touch, later: Touch) -> Race | MissingFence | None:
    """What is wrong if the two touch the same element."""
    first, second, events = earlier.access, later.access, [earlier.access.event, later.access.event]
    if not second.after(first):
        cure = READ_ONLY if first.engine and first.write else ORDER
        return Race(f"on {later.name}: nothing orders these two", events, cure)
    if first.write and second.engine and not first.engine:
        return MissingFence(f"on {later.name}: threads write, then an engine", events, NO_FENCE)
    threads = earlier.threads and later.threads and first.actor == second.actor
    if threads and earlier.meeting == later.meeting and not earlier.same_threads(later):
        return Race(f"on {later.name}: one thread and then another, which have not met", events, MEET)
    return None

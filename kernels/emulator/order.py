"""Happens-before: the order that holds between operations whatever the timing, kept as vector clocks.

Each partition of warps, and each operation of an engine, is an actor that counts its own steps. Its vector clock holds,
for every other actor, the latest step that certainly came before. Clocks are joined where the GPU synchronises: from an
arrival at an mbarrier to the waits for that phase, from a copy that has landed to its barrier, from a product to
`warpgroup_mma_wait`. Two accesses of which neither is in the other's clock are a race, even if this run ordered them.

Source:
    Lamport, "Time, clocks, and the ordering of events in a distributed system", CACM 1978.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

_numbers = itertools.count()


def new_actor() -> int:
    """A number that no other actor has."""
    return next(_numbers)


@dataclass
class VectorClock:
    """The latest step of each actor that is past, and the latest that a proxy fence has made visible to the engines.

    Threads reach shared memory through the generic proxy, the copy engine and the tensor cores through the async proxy.
    Only `fence_async_shared` orders the two: it makes all that is past at that point visible to the engines.
    """

    past: dict[int, int] = field(default_factory=dict)
    fenced: dict[int, int] = field(default_factory=dict)

    def join(self, other: VectorClock) -> None:
        """Adds the steps that are past for another actor."""
        _take_later(self.past, other.past)
        _take_later(self.fenced, other.fenced)

    def add(self, actor: int, step: int) -> None:
        """Notes that an actor's step is past."""
        self.past[actor] = step

    def fence(self) -> None:
        """Notes that all that is past is visible to the engines."""
        _take_later(self.fenced, self.past)

    def copy(self) -> VectorClock:
        """A clock of its own with the same content."""
        return VectorClock(dict(self.past), dict(self.fenced))


def _take_later(mine: dict[int, int], theirs: dict[int, int]) -> None:
    for actor, step in theirs.items():
        if mine.get(actor, -1) < step:
            mine[actor] = step

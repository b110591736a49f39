"""Who knows of what: the order in which operations must happen, whatever the timing.

Each partition of warps, and each operation of an engine, is an actor that counts its own steps. Knowledge says up to
which step of every other actor this one's past reaches (a vector clock). It is handed on where the GPU hands it on:
from an arrival at an mbarrier to those who wait for it, from a copy that has landed to its barrier, from a product to
`warpgroup_mma_wait`. Two accesses of which neither knows the other are a race, even if this run happened to order them.

Source:
    Lamport, «Time, clocks, and the ordering of events in a distributed system», CACM 1978.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

_numbers = itertools.count()


def new_actor() -> int:
    """A number that no other actor has."""
    return next(_numbers)


@dataclass
class Knowledge:
    """The steps of other actors that are past, and those of them that a proxy fence has made visible to the engines.

    Threads reach shared memory through the generic proxy, the copy engine and the tensor cores through the async proxy.
    The two are ordered only by `fence_async_shared`: it makes all that is known at that point known to the engines.
    """

    past: dict[int, int] = field(default_factory=dict)
    fenced: dict[int, int] = field(default_factory=dict)

    def join(self, other: Knowledge) -> None:
        """Takes in what another actor hands on."""
        _take_later(self.past, other.past)
        _take_later(self.fenced, other.fenced)

    def add(self, actor: int, step: int) -> None:
        self.past[actor] = step

    def fence(self) -> None:
        _take_later(self.fenced, self.past)

    def copy(self) -> Knowledge:
        return Knowledge(dict(self.past), dict(self.fenced))


def _take_later(mine: dict[int, int], theirs: dict[int, int]) -> None:
    for actor, step in theirs.items():
        if mine.get(actor, -1) < step:
            mine[actor] = step

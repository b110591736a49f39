"""mbarriers: 64 bits of shared memory that count arrivals and bytes, and tell complete phases from the current one.

A phase is complete when as many arrivals as `init` said, and all expected bytes, have come; then the next begins. A
wait names a parity: it goes on when the phase of that parity is the latest complete one. Before the first phase stands
one of parity 1 that counts as complete, so that a producer's first wait can go through at once.

Source:
    PTX ISA, «Parallel Synchronization and Communication Instructions: mbarrier».
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kernels.emulator.order import Knowledge
from kernels.emulator.reports import Event, WrongArrivals, WrongBytes

EXPECT = "mbarrier.expect must name the bytes of all copies that complete the phase: desc.block_type.nbytes"


@dataclass
class Barrier:
    """One mbarrier.

    Args:
        name: as in the kernel, `k_ready[1]`.
        arrivals: how many complete a phase.
    """

    name: str
    arrivals: int
    phases: int = 0  # complete ones
    missing: int = 0  # arrivals until the current phase is complete
    bytes_due: int = 0  # expected and not yet landed; negative while a copy has landed before it was expected
    under_way: int = 0  # bytes of copies that were asked for and have not landed
    seen: bool = True  # whether anybody has waited for the latest complete phase
    waited_too_early: Event | None = None  # a wait that went on, on an older phase, since the latest copy was asked for
    gathered: Knowledge = field(default_factory=Knowledge)  # what those who arrived in the current phase know
    released: Knowledge = field(default_factory=Knowledge)  # what a wait learns
    events: list[Event] = field(default_factory=list)  # those of the current phase
    last_phase: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.missing = self.arrivals

    def is_complete(self, parity: int) -> bool:
        """Whether a wait for this parity goes on."""
        return self.phases & 1 != parity

    def arrive(self, count: int, knows: Knowledge, event: Event) -> None:
        """Raises WrongArrivals where more come than the phase has left."""
        self.events.append(event)
        if count > self.missing:
            what = f"{self.name} gets {count} arrivals in phase {self.phases}, which lacks {self.missing}"
            raise WrongArrivals(what, self.events)
        self.missing -= count
        self.gathered.join(knows)
        self._complete()

    def expect(self, nbytes: int, knows: Knowledge, event: Event) -> None:
        """One arrival, and so many bytes more that are due."""
        self.bytes_due += nbytes
        self.arrive(1, knows, event)

    def land(self, nbytes: int, knows: Knowledge, event: Event) -> None:
        """A copy has brought its bytes."""
        self.bytes_due -= nbytes
        self.under_way -= nbytes
        self.gathered.join(knows)
        self.events.append(event)
        self._complete()

    def _complete(self) -> None:
        if self.missing:
            return
        if self.bytes_due < 0:
            what = f"{self.name} got {-self.bytes_due} bytes more than it was told to expect"
            raise WrongBytes(what, self.events, EXPECT)
        if self.bytes_due:
            return
        if self.under_way:
            what = f"{self.name} completes phase {self.phases}, and {self.under_way} bytes more are on their way to it"
            raise WrongBytes(what, self.events, EXPECT)
        if not self.seen:
            what = f"{self.name} completes phase {self.phases} before anybody has waited for phase {self.phases - 1}"
            cure = "an arrival too many, or a wait too few: the parity says no more which phase is complete"
            raise WrongArrivals(what, [*self.last_phase, *self.events], cure)
        self.phases += 1
        self.missing, self.seen = self.arrivals, False
        self.released.join(self.gathered)
        self.last_phase, self.events = self.events, []

    def state(self) -> str:
        """Its current phase in words, for a report."""
        bytes_due = f", {self.bytes_due} bytes due" if self.bytes_due else ""
        arrived = self.arrivals - self.missing
        return f"{self.name} is in phase {self.phases} with {arrived} of {self.arrivals} arrivals{bytes_due}"

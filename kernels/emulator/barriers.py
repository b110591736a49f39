"""mbarriers: 64 bits of shared memory that count arrivals and bytes, phase by phase.

A phase is complete when as many arrivals as given to `init`, and all expected bytes, have come; then the next begins. A
wait names a parity: it goes on when the phase of that parity is the latest complete one. The phase before the first has
parity 1 and counts as complete, so that a producer's first wait does not block.

Source:
    PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kernels.emulator.order import VectorClock
from kernels.emulator.reports import Event, WrongArrivals, WrongBytes

EXPECT = "mbarrier.expect must name the bytes of all copies that complete the phase: desc.block_type.nbytes"


@dataclass
class Barrier:
    """One mbarrier.

    Args:
        name: as in the kernel, `k_ready[1]`.
        arrivals: the number that completes a phase.
    """

    name: str
    arrivals: int
    phases: int = 0  # the number of complete phases
    missing: int = 0  # arrivals until the current phase is complete
    bytes_due: int = 0  # expected and not yet landed; negative while a copy has landed before it was expected
    under_way: int = 0  # bytes of copies that were issued and have not landed
    seen: bool = True  # whether a wait has gone on for the latest complete phase
    waited_too_early: Event | None = None  # a wait that went on at an older phase since the latest copy was issued
    gathered: VectorClock = field(default_factory=VectorClock)  # joined clocks of the arrivals in the current phase
    released: VectorClock = field(default_factory=VectorClock)  # the clock that a wait joins
    events: list[Event] = field(default_factory=list)  # arrivals and copies of the current phase
    last_phase: list[Event] = field(default_factory=list)  # and of the one before

    def __post_init__(self) -> None:
        self.missing = self.arrivals

    def is_complete(self, parity: int) -> bool:
        """Whether a wait for this parity goes on."""
        return self.phases & 1 != parity

    def arrive(self, count: int, clock: VectorClock, event: Event) -> None:
        """Counts arrivals. Raises WrongArrivals where the phase lacks fewer than `count`."""
        self.events.append(event)
        if count > self.missing:
            what = f"{self.name} gets {count} arrivals in phase {self.phases}, which lacks {self.missing}"
            raise WrongArrivals(what, self.events)
        self.missing -= count
        self.gathered.join(clock)
        self._complete()

    def expect(self, nbytes: int, clock: VectorClock, event: Event) -> None:
        """One arrival, and `nbytes` more bytes that are due."""
        self.bytes_due += nbytes
        self.arrive(1, clock, event)

    def land(self, nbytes: int, clock: VectorClock, event: Event) -> None:
        """The bytes of a copy have landed."""
        self.bytes_due -= nbytes
        self.under_way -= nbytes
        self.gathered.join(clock)
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
            what = f"{self.name} completes phase {self.phases} before a wait for phase {self.phases - 1}"
            cure = "an arrival too many or a wait too few: the parity no longer tells which phase is complete"
            raise WrongArrivals(what, [*self.last_phase, *self.events], cure)
        self.phases += 1
        self.missing, self.seen = self.arrivals, False
        self.released.join(self.gathered)
        self.last_phase, self.events = self.events, []

    def state(self) -> str:
        """Its current phase, as text for a report."""
        bytes_due = f", {self.bytes_due} bytes due" if self.bytes_due else ""
        arrived = self.arrivals - self.missing
        return f"{self.name} is in phase {self.phases} with {arrived} of {self.arrivals} arrivals{bytes_due}"

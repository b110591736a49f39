"""The order of execution. Partitions of warps are threads, of which the holder of the baton runs; operations of the
engines land in between.

Without a seed the order is always the same: a partition runs until it must wait, then the next one that can go on; a
copy lands as late as possible, when no partition can go on. With a seed the scheduler may, before every operation,
switch to another partition or land any operation that an engine may finish.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kernels.emulator.barriers import EXPECT, Barrier
from kernels.emulator.global_memory import GlobalMemory
from kernels.emulator.memory import Access, Allocation
from kernels.emulator.order import VectorClock, new_actor
from kernels.emulator.reports import Deadlock, Event, UseAfterFree, WrongBytes, here

_running = threading.local()


class Stop(BaseException):
    """Raised in the other partitions' threads after one has failed, to end them."""


@dataclass(eq=False)
class Operation:
    """An asynchronous operation of an engine: a copy, a product.

    Args:
        event: its issue.
        land: performs it.
        after: the operation of the same engine that must complete before.
        uses: the shared memory that it reads or writes; none where the end of the program waits for it.
    """

    event: Event
    land: Callable[[], None]
    after: Operation | None
    uses: list[Allocation]
    actor: int = field(default_factory=new_actor)
    done: bool = False

    @property
    def clock(self) -> VectorClock:
        """The clock that a wait for its completion joins."""
        return VectorClock({self.actor: 0}, {self.actor: 0})


@dataclass(eq=False)
class Partition:
    """Warps that run one function: the whole block, or one part of `gl.warp_specialize`."""

    name: str
    num_warps: int
    program: Program
    clock: VectorClock = field(default_factory=VectorClock)
    actor: int = field(default_factory=new_actor)
    step: int = 0
    can_go_on: Callable[[], bool] = lambda: True
    waits_for: str = ""
    waits_at: Event | None = None
    barrier: Barrier | None = None
    finished: bool = False
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    products: list[Operation] = field(default_factory=list)  # issued and not yet waited for, oldest first
    stores: list[Operation] = field(default_factory=list)  # copies out: their reads of shared memory, oldest first
    writes: list[Operation] = field(default_factory=list)  # and their writes to global memory
    meetings: int = 0  # how often its threads have certainly met

    def event(self, what: str) -> Event:
        """An operation of this partition, at the line that is running. With a seed, others may run before it."""
        self.program.maybe_switch(self)
        self.step += 1
        self.clock.add(self.actor, self.step)
        return Event(what, here(), self.name)

    def access(self, what: str, write: bool) -> Access:
        """An access to shared memory by this partition's threads."""
        event = self.event(what)
        return Access(event, self.actor, self.step, self.clock.copy(), write=write, engine=False)

    def wait(self, condition: Callable[[], bool], event: Event, waits_for: str, barrier: Barrier | None = None) -> None:
        """Runs other partitions and operations until the condition holds."""
        self.can_go_on, self.waits_at, self.waits_for, self.barrier = condition, event, waits_for, barrier
        self.program.switch(self)
        self.can_go_on, self.waits_at = (lambda: True), None


class Program:
    """One block of threads: its partitions, the operations under way, its shared memory.

    Args:
        place: program ids, as gl.program_id gives them.
        grid: programs along each axis.
        seed: of the interleaving; None for the plain order.
    """

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], num_warps: int, seed: str | None = None):
        self.place, self.grid, self.num_warps = place, grid, num_warps
        self.random = None if seed is None else random.Random(f"{seed} {place}")
        self.partitions = [Partition("all warps", num_warps, self)]
        self.asked_for: list[Operation] = []
        self.under_way: list[Operation] = []
        self.allocations: list[Allocation] = []
        self.global_memory = GlobalMemory()
        self.failure: BaseException | None = None
        self.choices: list[int] = []

    def run(self, function: Callable[[], None]) -> None:
        """Runs the kernel's body in this thread, and checks that no operation is left in flight."""
        _running.partition = self.partitions[0]
        try:
            function()
            self._check_end()
        finally:
            del _running.partition

    def specialize(self, parts: list[tuple[str, int, Callable[[], Any]]]) -> Any:
        """Runs several functions concurrently: the first one by the current warps, each other one by new warps."""
        default = current()
        (name, _, function), *workers = parts
        outer_name, default.name = default.name, name
        event = default.event("warp_specialize")
        default.meetings += 1
        threads = [threading.Thread(target=self._work, args=(self._fork(default, *part[:2]), part[2]), daemon=True)
                   for part in workers]  # fmt: skip
        for thread in threads:
            thread.start()
        partners = self.partitions[1:]

        def until_all_end() -> Any:
            result = function()
            default.wait(lambda: all(p.finished for p in partners), event, "the other partitions to end")
            return result

        result = self._guard(until_all_end)
        default.meetings += 1
        for partner in partners:
            default.clock.join(partner.clock)
        del self.partitions[1:]
        default.name = outer_name
        return result

    def _fork(self, default: Partition, name: str, num_warps: int) -> Partition:
        worker = Partition(name, num_warps, self, default.clock.copy())
        self.partitions.append(worker)
        return worker

    def _work(self, worker: Partition, function: Callable[[], Any]) -> None:
        """A worker's thread: takes the baton, runs its function, passes the baton on."""

        def turn() -> None:
            worker.baton.acquire()
            if self.failure is None:
                function()
                worker.finished = True
                self.switch(worker, ends=True)

        _running.partition = worker
        with contextlib.suppress(BaseException):  # _guard has recorded it; the first partition raises it
            self._guard(turn)

    def _guard(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except BaseException as failure:
            self._fail(failure)
            raise self.failure from None  # type: ignore[misc]

    def _fail(self, failure: BaseException) -> None:
        if self.failure is None:
            self.failure = failure
        for partition in self.partitions:
            partition.baton.release()

    def start(self, operation: Operation) -> None:
        """Adds an asynchronous operation to those under way."""
        self.asked_for.append(operation)
        self.under_way.append(operation)

    def finish(self, operation: Operation) -> None:
        """Lands an operation now, after those that must complete before it."""
        if operation.done:
            return
        if operation.after is not None:
            self.finish(operation.after)
        operation.done = True
        self.under_way.remove(operation)
        operation.land()

    def maybe_switch(self, me: Partition) -> None:
        """With a seed, switches to another partition or operation half of the time."""
        if self.random is not None and self.random.random() < 0.5:
            self.switch(me)

    def switch(self, me: Partition, ends: bool = False) -> None:
        """Runs others until the scheduler chooses this partition again and its condition holds."""
        while True:
            choice = self._choose(me)
            if isinstance(choice, Operation):
                self.finish(choice)
            elif choice is me:
                return
            else:
                choice.baton.release()
                if ends:
                    return
                me.baton.acquire()
                if self.failure is not None:
                    raise Stop
                if me.can_go_on():
                    return

    def _choose(self, me: Partition) -> Partition | Operation:
        ready = [p for p in self.partitions if not p.finished and p.can_go_on()]
        landing = [op for op in self.under_way if op.after is None or op.after.done]
        options: list[Partition | Operation] = [*ready, *landing]
        if not options:
            self._deadlock()
        if self.random is not None:
            number = self.random.randrange(len(options))
            self.choices.append(number)
            return options[number]
        if me in ready:
            return me
        return options[0]

    def _deadlock(self) -> None:
        waiting = [p for p in self.partitions if not p.finished]
        events = [p.waits_at for p in waiting if p.waits_at]
        for partition in waiting:
            barrier = partition.barrier
            if barrier and barrier.bytes_due > 0 and not barrier.missing:
                what = f"{barrier.name} was told to expect {barrier.bytes_due} bytes more than any copy brings"
                raise WrongBytes(what, [*barrier.events, *events], EXPECT)
        waits = "; ".join(f"{p.name} waits for {p.waits_for}" for p in waiting)
        states = "; ".join(p.barrier.state() for p in waiting if p.barrier)
        raise Deadlock(f"no partition can go on. {waits}", events, states)

    def _check_end(self) -> None:
        """All partitions have ended. The next block gets the shared memory, so no engine may still be using it."""
        known = self.partitions[0].clock.past
        for operation in self.asked_for:
            if not operation.uses:
                self.finish(operation)
            elif operation.actor not in known:
                names = " and ".join(allocation.name for allocation in operation.uses)
                what = f"the program may end while {names} is still in use"
                raise UseAfterFree(what, [operation.event], "wait for it: tma.store_wait(0), or the copy's barrier")


def current() -> Partition:
    """The partition that is running."""
    return _running.partition

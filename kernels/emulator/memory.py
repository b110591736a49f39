"""Shared memory: its content, the latest accesses to each part, and whether they conflict.

An allocation starts as NaN, and so does the target of a copy until the copy lands. Every access is recorded with the
part that it touches, and compared with the earlier ones there by their vector clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon.language import _layouts as layouts

from kernels.emulator.barriers import EXPECT, Barrier
from kernels.emulator.order import VectorClock
from kernels.emulator.reports import (
    BadBarrier,
    Event,
    MissingFence,
    NotModelled,
    OutOfBounds,
    Race,
    Unwritten,
    UseAfterFree,
    WrongBytes,
)
from kernels.emulator.values import bad_layout, gluon_type, torch_type

Box = tuple[tuple[int, int], ...]  # (start, stop) of each dimension of the allocation
BLOCK_BYTES = 227 * 1024  # the shared memory of one block of threads on an H100 or H200


@dataclass(frozen=True)
class Access:
    """One access of an operation to a part of shared memory.

    Args:
        actor, step: the actor, and its step at that time.
        clock: the issuing actor's vector clock at that time.
        engine: through the async proxy (copy engine, tensor cores) if True, by threads if False.
        completes: the barrier that a copy into shared memory completes.
        box: the part; filled in by `Allocation.touch`.
    """

    event: Event
    actor: int
    step: int
    clock: VectorClock
    write: bool
    engine: bool
    completes: Barrier | None = None
    box: Box = ()

    def after(self, earlier: Access) -> bool:
        """Whether this access comes after an earlier one in every interleaving."""
        return self.clock.past.get(earlier.actor, -1) >= earlier.step

    def fenced_after(self, earlier: Access) -> bool:
        """Whether a fence stands between the earlier access and this one in every interleaving."""
        return self.clock.fenced.get(earlier.actor, -1) >= earlier.step


@dataclass
class Allocation:
    """A piece of shared memory, with the accesses that a later one may still conflict with."""

    name: str
    data: torch.Tensor
    freed: Event | None = None
    accesses: list[Access] = field(default_factory=list)
    barriers: dict[Box, Barrier] = field(default_factory=dict)
    written: torch.Tensor = field(init=False)  # for each element, whether anything has written it

    def __post_init__(self) -> None:
        self.written = torch.zeros(self.data.shape, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.data.numel() * self.data.element_size()

    def touch(self, label: str, box: Box, access: Access) -> None:
        """Records an access.

        Raises:
            Race, MissingFence, UseAfterFree: where it conflicts with an earlier one.
            Unwritten: where a read finds a part that nothing has written.
        """
        if self.freed:
            raise UseAfterFree(f"{self.name} is used after it was freed", [self.freed, access.event])
        access = replace(access, box=box)
        there = [earlier for earlier in self.accesses if _overlap(earlier.box, box)]
        for earlier in there:
            if access.write or earlier.write:
                _check_order(label, earlier, access)
        self._check_written(label, box, access, [earlier.event for earlier in there if earlier.write])
        self._remember(access)

    def _check_written(self, label: str, box: Box, access: Access, writes: list[Event]) -> None:
        part = self.written[tuple(slice(*bounds) for bounds in box)]
        if access.write:
            part.fill_(True)
        elif part.all():
            return
        elif not part.any():
            cure = "a copy into it is missing, or it is not the slot that was meant"
            raise Unwritten(f"{label} is read, and nothing was written there", [access.event], cure)
        else:
            what = f"{label} is read, and only {int(part.sum())} of its {part.numel()} elements were written"
            raise Unwritten(what, [*writes, access.event], "a copy into the rest is missing")

    def free(self, access: Access) -> None:
        """Ends the allocation. Raises UseAfterFree where an access to it may still be running."""
        for earlier in self.accesses:
            if not access.after(earlier):
                raise UseAfterFree(f"{self.name} is freed while it is still in use", [earlier.event, access.event])
        self.freed = access.event

    def _remember(self, access: Access) -> None:
        """Records an access, and drops those that it covers: what is ordered after it is ordered after them."""
        self.accesses = [
            earlier
            for earlier in self.accesses
            if not (_covers(access.box, earlier.box) and (access.write or _later_reader(access, earlier)))
        ]
        self.accesses.append(access)


def _later_reader(access: Access, earlier: Access) -> bool:
    return not earlier.write and earlier.engine == access.engine and access.after(earlier)


def _check_order(label: str, earlier: Access, later: Access) -> None:
    events = [earlier.event, later.event]
    if not later.after(earlier):
        barrier = earlier.completes
        if barrier and barrier.under_way > barrier.bytes_due:
            what = f"on {label}: {barrier.name} does not expect the copy, so a wait for it does not wait for the copy"
            raise WrongBytes(what, events, EXPECT)
        if barrier and barrier.waited_too_early:
            events.append(barrier.waited_too_early)
        raise Race(f"on {label}: nothing orders these two", events, _cure(earlier))
    if later.engine and not earlier.engine and not later.fenced_after(earlier):
        cure = "threads and engines see it in order only with fence_async_shared() between the two"
        raise MissingFence(f"on {label}: threads, then an engine", events, cure)


def _cure(earlier: Access) -> str:
    if earlier.completes and earlier.completes.waited_too_early:
        return f"the wait for {earlier.completes.name} went on at an older phase: its parity is wrong"
    if earlier.completes:
        return f"the copy completes {earlier.completes.name}: wait for that before the second"
    if earlier.engine:
        return "the first may still be reading: wait for it, then arrive at a barrier that the second waits for"
    return "the second must come after a wait for a barrier at which the first's warps arrive afterwards"


def _overlap(a: Box, b: Box) -> bool:
    return all(first[0] < second[1] and second[0] < first[1] for first, second in zip(a, b, strict=True))


def _covers(a: Box, b: Box) -> bool:
    return all(outer[0] <= inner[0] and inner[1] <= outer[1] for outer, inner in zip(a, b, strict=True))


@dataclass(eq=False)
class MemDesc:
    """Gluon's shared-memory descriptor: a view of an allocation.

    Args:
        dims: for each dimension of the view the allocation's dimension; None after a reshape.
        outside: a message if the index lies outside: only an access to such a part is a fault.
    """

    allocation: Allocation
    data: torch.Tensor
    box: Box
    dims: list[int] | None
    layout: Any
    outside: str = ""

    dtype = property(lambda self: gluon_type(self.data.dtype))
    shape = property(lambda self: list(self.data.shape))
    rank = property(lambda self: self.data.ndim)
    type = property(lambda self: SimpleNamespace(shape=self.shape, layout=self.layout, element_ty=self.dtype))

    @property
    def label(self) -> str:
        """`k_ring[1]`: the part, along dimensions of more than one element, without whole ones at the end."""
        parts = []
        for (start, stop), size in zip(self.box, self.allocation.data.shape, strict=True):
            if size > 1:
                parts.append(":" if stop - start == size else str(start) if stop == start + 1 else f"{start}:{stop}")
        while parts and parts[-1] == ":":
            parts.pop()
        return self.allocation.name + (f"[{', '.join(parts)}]" if parts else "")

    def index(self, index: Any) -> MemDesc:
        """One slot of a ring: the first dimension is taken away."""
        i, parts = int(index), self.shape[0]
        outside = "" if 0 <= i < parts else f"{self.label} has {parts} parts, and part {i} is used"
        dim = self._dim(0)
        start = self.box[dim][0] + i
        box = (*self.box[:dim], (start, start + 1), *self.box[dim + 1 :])
        dims = self.dims and self.dims[1:]
        return replace(self, data=self.data[i % parts], box=box, dims=dims, outside=self.outside or outside)

    def slice(self, start: int, length: int, dim: int = 0) -> MemDesc:
        """A part of one dimension."""
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise bad_layout(
                f"{self.label} has {self.shape[dim]} places, and {start} to {start + length} are asked for"
            )
        where = self._dim(dim)
        first = self.box[where][0] + start
        box = (*self.box[:where], (first, first + length), *self.box[where + 1 :])
        return replace(self, data=self.data.narrow(dim, start, length), box=box)

    def permute(self, order: Any) -> MemDesc:
        """The same memory with its dimensions in another order."""
        order = [int(i) for i in order]
        dims = self.dims and [self.dims[i] for i in order]
        layout = self.layout
        if isinstance(layout, layouts.NVMMASharedLayout) and order != sorted(order):
            layout = replace(layout, transposed=not layout.transposed)
        return replace(self, data=self.data.permute(order), dims=dims, layout=layout)

    def reshape(self, shape: Any) -> MemDesc:
        """The same memory in another shape."""
        if not self.data.is_contiguous():
            raise NotModelled("the emulator does not know .reshape after .permute: reshape first")
        layout = self.layout
        if isinstance(layout, layouts.NVMMASharedLayout):
            layout = replace(layout, rank=len(shape))
        return replace(self, data=self.data.view(list(shape)), dims=None, layout=layout)

    def _dim(self, dim: int) -> int:
        if self.dims is None:
            raise NotModelled("the emulator does not know .index or .slice after .reshape: index first, then reshape")
        return self.dims[dim]

    def touch(self, access: Access) -> None:
        """Compares an access with earlier ones to the same elements, raises a report where they race, and keeps it."""
        if self.outside:
            raise OutOfBounds(self.outside, [access.event])
        self.allocation.touch(self.label, self.box, access)

    def barrier(self, access: Access) -> Barrier:
        """The mbarrier at this place. Its use is recorded as a read of what its init wrote."""
        found = self.allocation.barriers.get(self.box)
        if found is None and not self.outside:
            what = f"{self.label} is not initialised, or was invalidated"
            raise BadBarrier(what, [access.event], "mbarrier.init comes first")
        self.touch(access)
        return found  # type: ignore[return-value]


def allocate(name: str, dtype: Any, shape: list[int], layout: Any) -> MemDesc:
    """Shared memory full of NaN (or of the most negative number, for integers)."""
    if not isinstance(layout, layouts.SharedLayout):
        raise bad_layout(f"{name}: shared memory is allocated with {layout}", "give it a shared layout")
    data = torch.empty(shape, dtype=torch_type(dtype))
    poison(data)
    box = tuple((0, size) for size in shape)
    return MemDesc(Allocation(name, data), data, box, list(range(len(shape))), layout)


def poison(data: torch.Tensor) -> None:
    """Fills a tensor with what nothing computes by accident: NaN, or the smallest integer."""
    data.fill_(torch.nan if data.dtype.is_floating_point else torch.iinfo(data.dtype).min)

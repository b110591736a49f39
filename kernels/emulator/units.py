"""The engines that work by themselves: the copy engine (TMA) and the tensor cores (WGMMA).

Asking for an operation only begins it. It lands when the scheduler says so; until then the target of a copy, and the
result of a product, are NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon.language import _layouts as layouts

from kernels.emulator.barriers import Barrier
from kernels.emulator.memory import Access, MemDesc, poison
from kernels.emulator.reports import Race
from kernels.emulator.scheduler import Operation, Partition
from kernels.emulator.values import Value, bad_layout, gluon_type, scalar


@dataclass
class Descriptor:
    """What TMA knows of a tensor in global memory: its shape, and the block that one copy takes.

    Args:
        tensor: a view of the memory in the descriptor's shape.
        padding: what lies outside: 0 or NaN.
    """

    tensor: torch.Tensor
    block_shape: list[int]
    layout: Any
    padding: float = 0.0

    dtype = property(lambda self: gluon_type(self.tensor.dtype))
    nbytes = property(lambda self: math.prod(self.block_shape) * self.tensor.element_size())
    nbytes_per_cta = nbytes
    block_type = property(
        lambda self: SimpleNamespace(shape=self.block_shape, nbytes=self.nbytes, element_ty=self.dtype)
    )
    shape = property(lambda self: [scalar(size) for size in self.tensor.shape])
    strides = property(lambda self: [scalar(stride, torch.int64) for stride in self.tensor.stride()])

    def __post_init__(self) -> None:
        item = self.tensor.element_size()
        if self.tensor.data_ptr() % 16 or any(stride * item % 16 for stride in self.tensor.stride()[:-1]):
            raise bad_layout("TMA wants a tensor that starts at 16 bytes and strides in multiples of 16 bytes")
        if self.tensor.stride(-1) != 1 or self.block_shape[-1] * item < 16:
            raise bad_layout("TMA wants a last dimension without gaps, and a block of at least 16 bytes in it")

    def read(self, corner: list[int]) -> torch.Tensor:
        """The block at a corner, padded where it lies outside."""
        block = torch.full(self.block_shape, self.padding).to(self.tensor.dtype)
        inside, outside = self._part(corner)
        block[inside] = self.tensor[outside]
        return block

    def write(self, corner: list[int], block: torch.Tensor) -> None:
        """What of the block lies inside the tensor."""
        inside, outside = self._part(corner)
        self.tensor[outside] = block[inside]

    def _part(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a block that exists: as slices of the block, and of the tensor."""
        inside, outside = [], []
        for start, length, size in zip(corner, self.block_shape, self.tensor.shape, strict=True):
            first, stop = max(start, 0), max(min(start + length, size), max(start, 0))
            inside.append(slice(first - start, stop - start))
            outside.append(slice(first, stop))
        return tuple(inside), tuple(outside)


def _check_block(descriptor: Descriptor, corner: list[int], smem: MemDesc) -> None:
    wanted = (descriptor.block_shape, descriptor.dtype, descriptor.layout)
    got = (smem.shape, smem.dtype, smem.layout)
    for name, want, have in zip(("shape", "type", "layout"), wanted, got, strict=True):
        if want != have:
            raise bad_layout(f"the descriptor's block has the {name} {want}, {smem.label} {have}", "give both the same")
    if len(corner) != len(descriptor.block_shape):
        raise bad_layout(f"{len(corner)} coordinates for a block of {len(descriptor.block_shape)} dimensions")


def copy_in(me: Partition, descriptor: Descriptor, corner: list[int], barrier: Barrier, smem: MemDesc) -> None:
    """Begins a copy from global to shared memory; its bytes complete the barrier."""
    _check_block(descriptor, corner, smem)
    event = me.event(f"TMA copy into {smem.label}")

    def land() -> None:
        smem.data.copy_(descriptor.read(corner))
        barrier.land(descriptor.nbytes, operation.knowledge, event)

    operation = Operation(event, land, None, [smem.allocation])
    smem.touch(Access(event, operation.actor, 0, me.knowledge.copy(), True, engine=True, completes=barrier))
    barrier.waited_too_early = None
    poison(smem.data)
    me.program.start(operation)


def copy_out(me: Partition, descriptor: Descriptor, corner: list[int], smem: MemDesc) -> None:
    """Begins a copy from shared to global memory; `wait_for_stores` waits for it."""
    _check_block(descriptor, corner, smem)
    event = me.event(f"TMA copy out of {smem.label}")
    operation = Operation(event, lambda: descriptor.write(corner, smem.data), None, [smem.allocation])
    smem.touch(Access(event, operation.actor, 0, me.knowledge.copy(), write=False, engine=True))
    me.program.start(operation)
    me.stores.append(operation)


def wait_for_stores(me: Partition, pending: int) -> None:
    """Goes on when all but the latest `pending` copies out of shared memory have read it."""
    me.event("store_wait")
    _finish_all_but(me, me.stores, pending)


def _finish_all_but(me: Partition, operations: list[Operation], pending: int) -> None:
    while len(operations) > pending:
        operation = operations.pop(0)
        me.program.finish(operation)
        me.knowledge.join(operation.knowledge)


class Accumulator:
    """The result of an asynchronous product: no number until `warpgroup_mma_wait` has returned it."""

    def __init__(self, data: torch.Tensor, layout: Any, operation: Operation | None, owner: Partition):
        self._data, self._layout, self._operation, self._owner = data, layout, operation, owner

    def __getattr__(self, name: str) -> Any:
        self._refuse()

    def _refuse(self, *_: Any) -> Any:
        raise early_use(self._operation, self._owner)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = _refuse


class EarlyValue(Value):
    """What `warpgroup_mma_wait(n)` returned of a product that is not among those waited for."""

    def __init__(self, data: torch.Tensor, layout: Any, operation: Operation, owner: Partition):
        self._hidden, self.layout, self._operation, self._owner = data, layout, operation, owner

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        if self._operation not in self._owner.products:
            return self._hidden
        raise early_use(self._operation, self._owner)


def early_use(operation: Operation | None, me: Partition) -> Race:
    events = ([operation.event] if operation else []) + [me.event("use of its result")]
    cure = "warpgroup_mma_wait(n, deps=(…,)) must come between, with n the number of later products that may still run"
    return Race("on the accumulator: the tensor cores are still writing it", events, cure)


def multiply(
    me: Partition, a: MemDesc | Value, b: MemDesc, acc: Value | Accumulator, use_acc: bool, is_async: bool
) -> Any:
    """Begins acc + a @ b on the tensor cores, in fp32; waits for it unless asynchronous."""
    before, start, layout = _accumulator(me, acc)
    _check_product(me, a, b, list(start.shape), layout)
    event = me.event(f"warpgroup_mma of {a.label if isinstance(a, MemDesc) else 'registers'} and {b.label}")
    result = torch.full_like(start, torch.nan)
    left = a.data

    def land() -> None:
        product = left.float() @ b.data.float()
        result.copy_(start + product if use_acc else product)

    tiles = [x for x in (a, b) if isinstance(x, MemDesc)]
    previous = me.products[-1] if me.products else None
    operation = Operation(event, land, previous, [tile.allocation for tile in tiles])
    for tile in tiles:
        tile.touch(Access(event, operation.actor, 0, me.knowledge.copy(), write=False, engine=True))
    me.program.start(operation)
    me.products.append(operation)
    if is_async:
        return Accumulator(result, layout, operation, me)
    _finish_all_but(me, me.products, 0)
    return Value(result, layout)


def wait_for_products(me: Partition, pending: int, deps: tuple[Any, ...]) -> Any:
    """Goes on when all but the latest `pending` products are done; returns the deps as numbers."""
    me.event("warpgroup_mma_wait")
    _finish_all_but(me, me.products, pending)
    results = tuple(_as_value(me, dep) for dep in deps)
    return results[0] if len(results) == 1 else results


def _as_value(me: Partition, dep: Any) -> Any:
    if isinstance(dep, Accumulator):
        if dep._operation is not None and dep._operation in me.products:
            return EarlyValue(dep._data, dep._layout, dep._operation, me)
        return Value(dep._data, dep._layout)
    return dep


def _accumulator(me: Partition, acc: Value | Accumulator) -> tuple[Operation | None, torch.Tensor, Any]:
    """An accumulator may be handed on from product to product without a wait: they run in order."""
    if isinstance(acc, Accumulator):
        return acc._operation, acc._data, acc._layout
    if isinstance(acc, EarlyValue):
        return acc._operation, acc._hidden, acc.layout
    return None, acc.data, acc.layout


def _check_product(me: Partition, a: Any, b: MemDesc, shape: list[int], layout: Any) -> None:
    """What the compiler or the GPU would refuse, named.

    Source:
        PTX ISA, «Asynchronous Warpgroup Level Matrix Instructions»: shapes, and 8-bit operands along K only.
    """
    if not isinstance(layout, layouts.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise bad_layout(f"the accumulator of warpgroup_mma is in {layout}", "use NVMMADistributedLayout([3, 0], …)")
    warps = layout.warps_per_cta[0] * layout.warps_per_cta[1]
    if warps != me.num_warps or warps % 4:
        raise bad_layout(f"the accumulator is laid out for {warps} warps, and {me.num_warps} run this",
                         "warpgroup_mma wants warpgroups of 4 warps, all of them in warps_per_cta")  # fmt: skip
    if not isinstance(b, MemDesc):
        raise bad_layout("b of warpgroup_mma is in registers", "b must be in shared memory")
    (m, k), (k_too, n) = a.shape, b.shape
    if k != k_too or [m, n] != shape or a.dtype != b.dtype:
        raise bad_layout(f"warpgroup_mma of {a.dtype} {a.shape} and {b.dtype} {b.shape} into {shape} does not fit")
    bits = a.dtype.primitive_bitwidth
    instruction = list(layout.instr_shape)
    if m < 64 or n % instruction[1] or instruction[1] > 256 or instruction[0] != 16 or instruction[2] != 256 // bits:
        raise bad_layout(f"instr_shape {instruction} does not fit a product of {m} × {n} in {a.dtype}",
                         f"it wants [16, a divisor of {n} up to 256, {256 // bits}], and at least 64 rows")  # fmt: skip
    for name, tile, row_major in (("a", a, True), ("b", b, False)):
        if isinstance(tile, MemDesc):
            if not isinstance(tile.layout, layouts.NVMMASharedLayout):
                raise bad_layout(f"{name} of warpgroup_mma, {tile.label}, is in {tile.layout}", "use NVMMASharedLayout")
            if bits == 8 and tile.layout.transposed == row_major:
                raise bad_layout(f"{name} of an 8-bit warpgroup_mma, {tile.label}, is not contiguous along K")
        elif tile.layout != layouts.DotOperandLayout(0, layout, 32 // bits):
            cure = f"gl.convert_layout(a, gl.DotOperandLayout(0, layout of the accumulator, k_width={32 // bits}))"
            raise bad_layout(f"a of warpgroup_mma, in registers, is in {tile.layout}", cure)

"""The asynchronous engines: the copy engine (TMA) and the tensor cores (WGMMA).

Issuing an operation only begins it. It lands when the scheduler chooses it; until then the target of a copy, and the
result of a product, are NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _layouts as layouts

from kernels.emulator.global_memory import Touch
from kernels.emulator.memory import Access, MemDesc, poison
from kernels.emulator.reports import NotModelled, Race
from kernels.emulator.scheduler import Operation, Partition
from kernels.emulator.values import Value, bad_layout, gluon_type, scalar

ACCUMULATORS = {  # types that a product of each operand type may be summed in
    gl.bfloat16: (gl.float32,),
    gl.float16: (gl.float32, gl.float16),
    gl.float8e4nv: (gl.float32, gl.float16),
}


@dataclass
class Descriptor:
    """A TMA descriptor of a tensor in global memory: its shape, and the block of one copy.

    Args:
        tensor: a view of the memory in the descriptor's shape.
        padding: the value of elements outside the tensor: 0 or NaN.
        name: of the argument that it describes.
    """

    tensor: torch.Tensor
    block_shape: list[int]
    layout: Any
    padding: float = 0.0
    name: str = "tensor"

    dtype = property(lambda self: gluon_type(self.tensor.dtype))
    nbytes = property(lambda self: math.prod(self.block_shape) * self.tensor.element_size())
    nbytes_per_cta = nbytes
    block_type = property(
        lambda self: SimpleNamespace(shape=self.block_shape, nbytes=self.nbytes, element_ty=self.dtype)
    )
    shape = property(lambda self: [scalar(size) for size in self.tensor.shape])
    strides = property(lambda self: [scalar(stride, torch.int64) for stride in self.tensor.stride()])
    type = property(lambda self: SimpleNamespace(block_type=self.block_type, layout=self.layout))

    def __post_init__(self) -> None:
        item = self.tensor.element_size()
        if self.tensor.data_ptr() % 16 or any(stride * item % 16 for stride in self.tensor.stride()[:-1]):
            raise bad_layout("TMA wants a tensor that starts at 16 bytes and strides in multiples of 16 bytes")
        if self.tensor.stride(-1) != 1 or self.block_shape[-1] * item < 16:
            raise bad_layout("TMA wants a last dimension without gaps, and a block of at least 16 bytes in it")
        if getattr(self.layout, "transposed", False):
            raise bad_layout(f"TMA wants a layout that is not transposed, and got {self.layout}")

    def read(self, corner: list[int]) -> torch.Tensor:
        """The block at a corner, padded where it lies outside."""
        block = torch.full(self.block_shape, self.padding).to(self.tensor.dtype)
        inside, outside = self._part(corner)
        block[inside] = self.tensor[outside]
        return block

    def write(self, corner: list[int], block: torch.Tensor) -> None:
        """Stores the part of the block that lies inside the tensor."""
        inside, outside = self._part(corner)
        self.tensor[outside] = block[inside]

    def touch(self, me: Partition, corner: list[int], access: Access) -> None:
        """Records an engine's access to the part of the block that lies inside the tensor."""
        part = self.tensor[self._part(corner)[1]]
        if part.numel():
            first = int(part.storage_offset())
            last = first + sum(
                (int(size) - 1) * int(step) for size, step in zip(part.shape, part.stride(), strict=True)
            )
            me.program.global_memory.touch(
                self.tensor, Touch(self.name, access, first, last, lambda: _elements(part), meeting=me.meetings)
            )

    def _part(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of a block inside the tensor: as slices of the block, and as slices of the tensor."""
        inside, outside = [], []
        for start, length, size in zip(corner, self.block_shape, self.tensor.shape, strict=True):
            first, stop = max(start, 0), max(min(start + length, size), max(start, 0))
            inside.append(slice(first - start, stop - start))
            outside.append(slice(first, stop))
        return tuple(inside), tuple(outside)


def _elements(part: torch.Tensor) -> torch.Tensor:
    """The offsets in memory of all elements of a view."""
    offsets = torch.tensor(part.storage_offset())
    for size, step in zip(part.shape, part.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * step
    return offsets.flatten()


def _check_block(descriptor: Descriptor, corner: list[int], smem: MemDesc) -> None:
    wanted = (descriptor.block_shape, descriptor.dtype, descriptor.layout)
    got = (smem.shape, smem.dtype, smem.layout)
    for name, want, have in zip(("shape", "type", "layout"), wanted, got, strict=True):
        if want != have:
            raise bad_layout(f"the descriptor's block has the {name} {want}, {smem.label} {have}", "give both the same")
    if len(corner) != len(descriptor.block_shape):
        raise bad_layout(f"{len(corner)} coordinates for a block of {len(descriptor.block_shape)} dimensions")


def copy_in(me: Partition, descriptor: Descriptor, corner: list[int], bar: MemDesc, smem: MemDesc) -> None:
    """Begins a copy from global to shared memory; its bytes complete the barrier."""
    _check_block(descriptor, corner, smem)
    event = me.event(f"TMA copy into {smem.label}")

    def land() -> None:
        smem.data.copy_(descriptor.read(corner))
        barrier.land(descriptor.nbytes, operation.clock, event)

    operation = Operation(event, land, None, [smem.allocation])
    access = Access(event, operation.actor, 0, me.clock.copy(), write=False, engine=False)
    barrier = bar.barrier(access)
    smem.touch(replace(access, write=True, engine=True, completes=barrier))
    descriptor.touch(me, corner, replace(access, engine=True))
    barrier.under_way += descriptor.nbytes
    barrier.waited_too_early = None
    poison(smem.data)
    me.program.start(operation)


def copy_out(me: Partition, descriptor: Descriptor, corner: list[int], smem: MemDesc) -> None:
    """Begins a copy from shared to global memory: a read, then a write. `wait_for_stores` waits for them."""
    _check_block(descriptor, corner, smem)
    event = me.event(f"TMA copy out of {smem.label}")
    block = torch.empty(descriptor.block_shape, dtype=descriptor.tensor.dtype)

    def land() -> None:
        block.copy_(smem.data)

    read = Operation(event, land, None, [smem.allocation])
    write = Operation(event, lambda: descriptor.write(corner, block), read, [])
    access = Access(event, read.actor, 0, me.clock.copy(), write=False, engine=True)
    smem.touch(access)
    descriptor.touch(me, corner, replace(access, actor=write.actor, write=True))
    me.program.start(read)
    me.program.start(write)
    me.stores.append(read)
    me.writes.append(write)


def wait_for_stores(me: Partition, pending: int, read_only: bool = True) -> None:
    """Goes on when all but the latest `pending` copies out of shared memory have read it, or have written as well."""
    me.event("store_wait")
    _finish_all_but(me, me.stores, pending)
    if not read_only:
        _finish_all_but(me, me.writes, pending)


def _finish_all_but(me: Partition, operations: list[Operation], pending: int) -> None:
    while len(operations) > pending:
        operation = operations.pop(0)
        me.program.finish(operation)
        me.clock.join(operation.clock)


class Accumulator(Value):
    """The result of an asynchronous product: readable once it is done and `warpgroup_mma_wait` has returned it.

    Args:
        returned: whether `warpgroup_mma_wait` returned it; the product may still be in flight.
    """

    def __init__(self, data: torch.Tensor, layout: Any, operation: Operation, owner: Partition, returned: bool = False):
        super().__init__(data, layout)
        self.operation, self.owner, self.returned, self.taken = operation, owner, returned, False

    @property
    def data(self) -> torch.Tensor:
        """The values; a `Race` where the product is still in flight."""
        if self.returned and self.operation not in self.owner.products:
            return self._data
        what = "on the accumulator: the tensor cores are still writing it"
        raise Race(what, [self.operation.event, self.owner.event("use of its result")], RETURN)

    def hand_on(self) -> torch.Tensor:
        """For the next product to accumulate into, without a wait: products run in order. Only one may take it."""
        if self.taken and self.operation in self.owner.products:
            what = "on the accumulator: a product goes on from it, and another has done so already"
            raise Race(what, [self.operation.event, self.owner.event("another product from it")], RETURN)
        self.taken = True
        return self._data


RETURN = "warpgroup_mma_wait(n, deps=(…,)) must come between, with n the number of later products that may still run"


def multiply(me: Partition, a: MemDesc | Value, b: MemDesc, acc: Value, use_acc: bool, is_async: bool) -> Value:
    """Begins acc + a @ b on the tensor cores, in fp32; waits for it unless asynchronous."""
    _check_product(a, b, acc)
    start = acc.hand_on() if isinstance(acc, Accumulator) else acc.data
    layout = acc.layout
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
        tile.touch(Access(event, operation.actor, 0, me.clock.copy(), write=False, engine=True))
    me.program.start(operation)
    me.products.append(operation)
    if is_async:
        return Accumulator(result, layout, operation, me)
    _finish_all_but(me, me.products, 0)
    return Value(result, layout)


def wait_for_products(me: Partition, pending: int, deps: tuple[Any, ...]) -> Any:
    """Goes on when all but the latest `pending` products are done; returns the deps, readable."""
    me.event("warpgroup_mma_wait")
    _finish_all_but(me, me.products, pending)
    results = tuple(
        Accumulator(dep._data, dep.layout, dep.operation, me, returned=True) if isinstance(dep, Accumulator) else dep
        for dep in deps
    )
    return results[0] if len(results) == 1 else results


def _check_product(a: Any, b: MemDesc, acc: Value) -> None:
    """Raises BadLayout for what the compiler or the GPU would refuse.

    Source:
        PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": shapes, types of the sums, 8-bit operands along K.
    """
    layout = acc.layout
    if not isinstance(layout, layouts.NVMMADistributedLayout) or list(layout.version) != [3, 0]:
        raise bad_layout(f"the accumulator of warpgroup_mma is in {layout}", "use NVMMADistributedLayout([3, 0], …)")
    if layout.warps_per_cta[0] % 4:
        what = f"the accumulator of warpgroup_mma has {layout.warps_per_cta[0]} warps along the rows"
        raise bad_layout(what, "it wants a multiple of 4 along the rows")
    if not isinstance(b, MemDesc):
        raise bad_layout("b of warpgroup_mma is in registers", "b must be in shared memory")
    (m, k), (k_too, n) = a.shape, b.shape
    if k != k_too or [m, n] != acc.shape or a.dtype != b.dtype:
        raise bad_layout(f"warpgroup_mma of {a.dtype} {a.shape} and {b.dtype} {b.shape} into {acc.shape} does not fit")
    sums = ACCUMULATORS.get(a.dtype)
    if sums is None:
        raise NotModelled(f"the emulator does not know warpgroup_mma of {a.dtype} (fp32 would be rounded to TF32)")
    if acc.dtype not in sums:
        raise bad_layout(f"warpgroup_mma of {a.dtype} sums in {' or '.join(map(str, sums))}, not in {acc.dtype}")
    bits = a.dtype.primitive_bitwidth
    rows, columns, depth = layout.instr_shape
    if m < 64 or rows != 16 or columns % 8 or columns > 256 or n % columns or depth != 256 // bits or k % depth:
        raise bad_layout(f"instr_shape {layout.instr_shape} does not fit a product of {m} × {n} × {k} in {a.dtype}",
                         f"it wants [16, 8 to 256 in steps of 8 and a divisor of {n}, {256 // bits}], 64 rows and "
                         f"{256 // bits} columns of a at least")  # fmt: skip
    for name, tile, row_major in (("a", a, True), ("b", b, False)):
        if isinstance(tile, MemDesc):
            if not isinstance(tile.layout, layouts.NVMMASharedLayout) or not tile.layout.swizzle_byte_width:
                raise bad_layout(f"{name} of warpgroup_mma, {tile.label}, is in {tile.layout}",
                                 "use NVMMASharedLayout, with a swizzle of 32 bytes at least")  # fmt: skip
            if bits == 8 and tile.layout.transposed == row_major:
                raise bad_layout(f"{name} of an 8-bit warpgroup_mma, {tile.label}, is not contiguous along K")
        elif tile.layout != layouts.DotOperandLayout(0, layout, 32 // bits):
            cure = f"gl.convert_layout(a, gl.DotOperandLayout(0, layout of the accumulator, k_width={32 // bits}))"
            raise bad_layout(f"a of warpgroup_mma, in registers, is in {tile.layout}", cure)

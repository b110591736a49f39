"""The emulator's `gl`, `tma`, `mbarrier` and `hopper`: they replace Gluon's in a kernel's globals."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import torch
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.language.nvidia.hopper import tma as real_tma
from triton.experimental.gluon.language.nvidia.hopper.mbarrier import MBarrierLayout

from kernels.emulator import arithmetic, reductions, shapes, units
from kernels.emulator.arithmetic import as_value, make
from kernels.emulator.barriers import Barrier
from kernels.emulator.memory import BLOCK_BYTES, MemDesc, allocate
from kernels.emulator.reports import BadBarrier, Event, FailedAssert, NotModelled, OutOfBounds, assigned_name, here
from kernels.emulator.scheduler import current
from kernels.emulator.values import Value, bad_layout, scalar
from kernels.emulator.workers import warp_specialize

WAITS_FOR_WRITES = "read_only" in inspect.signature(real_tma.store_wait).parameters


class Namespace:
    """Replaces a module of Gluon. A name that it lacks raises `NotModelled` on access."""

    def __init__(self, name: str, members: dict[str, Any]):
        self._name, self._members = name, members

    def __getattr__(self, name: str) -> Any:
        if name in self._members:
            return self._members[name]
        raise NotModelled(f"the emulator does not know {self._name}.{name}; docs/emulator.md lists what it does")


# ---- the program ----


def program_id(axis: int) -> Value:
    return scalar(current().program.place[axis])


def num_programs(axis: int) -> Value:
    return scalar(current().program.grid[axis])


def static_assert(cond: Any, msg: str = "") -> None:
    if not cond:
        raise FailedAssert(f"static_assert {msg}", [Event("static_assert", here(), "compiler")])


def device_assert(cond: Any, msg: str = "", mask: Any = True) -> None:
    if not bool((as_value(cond).data | ~as_value(mask).data).all()):
        raise FailedAssert(f"device_assert {msg}", [Event("device_assert", here(), current().name)])


def block_barrier(*, cluster: bool = False) -> None:
    if cluster:
        raise NotModelled("the emulator does not know clusters of blocks")
    me = current()
    me.event("barrier")
    me.meetings += 1


def device_print(prefix: str, *args: Any, hex: bool = False) -> None:
    """Prints whole tensors, once and shortened: the GPU prints each thread's elements."""
    me = current()
    values = [as_value(x).data for x in args]
    print(f"program {me.program.place}, {me.name}: {prefix}", *(x if x.ndim else x.item() for x in values))


def kernel_range(*bounds: Any) -> Any:
    """`range` in a kernel: it yields run-time scalars."""
    return map(scalar, range(*(int(bound) for bound in bounds)))


# ---- shared memory ----


def allocate_shared_memory(element_ty: Any, shape: Any, layout: Any, value: Any = None) -> MemDesc:
    me = current()
    name = assigned_name("shared memory")
    event = me.event(f"allocation of {name}")
    smem = allocate(name, element_ty, [int(size) for size in shape], layout)
    program = me.program
    program.allocations.append(smem.allocation)
    alive = [allocation for allocation in program.allocations if not allocation.freed]
    total = sum(allocation.nbytes for allocation in alive)
    if total > BLOCK_BYTES:
        sizes = ", ".join(f"{allocation.name} {allocation.nbytes}" for allocation in alive)
        raise OutOfBounds(f"{total} bytes of shared memory, and a block has {BLOCK_BYTES}: {sizes}", [event])
    if value is not None:
        smem_store(smem, value)
    return smem


def smem_load(smem: MemDesc, layout: Any) -> Value:
    me = current()
    smem.touch(me.access(f"load from {smem.label}", write=False))
    return make(smem.data.clone(), layout)


def smem_store(smem: MemDesc, value: Value) -> None:
    if value.shape != smem.shape or value.dtype != smem.dtype:
        raise bad_layout(f"{smem.label} is {smem.dtype} {smem.shape}, and {value.dtype} {value.shape} is stored there")
    me = current()
    smem.touch(me.access(f"store to {smem.label}", write=True))
    smem.data.copy_(value.data)


def smem_free(smem: MemDesc) -> None:
    me = current()
    smem.allocation.free(me.access(f"end of {smem.label}", write=True))


MemDesc.load = smem_load  # type: ignore[attr-defined]
MemDesc.store = smem_store  # type: ignore[attr-defined]
MemDesc._keep_alive = smem_free  # type: ignore[attr-defined]


def fence_async_shared(cluster: bool = False) -> None:
    me = current()
    me.event("fence_async_shared")
    me.clock.fence()


# ---- barriers ----


def barrier_init(mbarrier: MemDesc, count: int) -> None:
    access = current().access(f"init of {mbarrier.label}", write=True)
    if int(count) < 1:
        raise BadBarrier(f"{mbarrier.label} is initialised for {count} arrivals, wants one at least", [access.event])
    if mbarrier.box in mbarrier.allocation.barriers:
        cure = "init it once, or mbarrier.invalidate it before"
        raise BadBarrier(f"{mbarrier.label} is initialised again while it is in use", [access.event], cure)
    mbarrier.touch(access)
    mbarrier.allocation.barriers[mbarrier.box] = Barrier(mbarrier.label, int(count))


def barrier_invalidate(mbarrier: MemDesc) -> None:
    mbarrier.barrier(current().access(f"invalidate of {mbarrier.label}", write=True))
    del mbarrier.allocation.barriers[mbarrier.box]


def barrier_expect(mbarrier: MemDesc, bytes_per_cta: int = 0, pred: Any = True, *, bytes: int = 0) -> None:
    """`bytes` is the name in triton 3.6."""
    if pred:
        me, nbytes = current(), int(bytes_per_cta) or int(bytes)
        me.meetings += 1
        access = me.access(f"expect {nbytes} bytes at {mbarrier.label}", write=False)
        mbarrier.barrier(access).expect(nbytes, me.clock, access.event)


def barrier_arrive(mbarrier: MemDesc, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        me = current()
        me.meetings += 1
        access = me.access(f"arrive at {mbarrier.label}", write=False)
        mbarrier.barrier(access).arrive(int(count), me.clock, access.event)


def barrier_wait(mbarrier: MemDesc, phase: Any, pred: Any = True, deps: tuple = ()) -> None:
    if not pred:
        return
    me, parity = current(), int(phase)
    access = me.access(f"wait for {mbarrier.label}, phase {parity}", write=False)
    event, found = access.event, mbarrier.barrier(access)
    if parity not in (0, 1):
        raise BadBarrier(f"a wait for {mbarrier.label} at phase {parity}, and a parity is 0 or 1", [event], "phase & 1")
    if found.is_complete(parity):
        found.waited_too_early = event if found.bytes_due else None
    else:
        me.wait(lambda: found.is_complete(parity), event, f"{mbarrier.label}, phase {parity}", found)
    found.seen = True
    me.clock.join(found.released)


def allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> MemDesc:
    return allocate_shared_memory(real_gl.int64, [1] if batch is None else [batch, 1], MBarrierLayout())


# ---- engines ----


def tma_load(tensor_desc, coord, barrier, result, pred: Any = True, multicast: bool = False) -> None:
    if multicast:
        raise NotModelled("the emulator does not know multicast: it runs one block at a time")
    if pred:
        units.copy_in(current(), tensor_desc, [int(c) for c in coord], barrier, result)


def tma_store(tensor_desc, coord, src) -> None:
    units.copy_out(current(), tensor_desc, [int(c) for c in coord], src)


def store_wait(pendings: int, read_only: bool = True) -> None:
    """`read_only=False` is in Gluon from triton 3.8 on."""
    if not read_only and not WAITS_FOR_WRITES:
        raise NotModelled(f"triton {version('triton')} has no store_wait(read_only=False): from 3.8 on")
    units.wait_for_stores(current(), int(pendings), read_only)


def make_tensor_descriptor(base, shape, strides, block_shape, layout, padding_option="zero") -> units.Descriptor:
    sizes, steps = [int(size) for size in shape], [int(step) for step in strides]
    tensor = base.memory.as_strided(sizes, steps, int(base.data))
    padding = torch.nan if padding_option == "nan" else 0.0
    return units.Descriptor(tensor, [int(size) for size in block_shape], layout, padding, base.name)


def warpgroup_mma(a, b, acc, *, use_acc: Any = True, precision=None, max_num_imprecise_acc=None, is_async=False) -> Any:
    return units.multiply(current(), a, b, acc, bool(use_acc), is_async)


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    if deps is None:
        raise bad_layout("warpgroup_mma_wait without deps", "hand the accumulators through it: deps=(acc,)")
    return units.wait_for_products(current(), int(num_outstanding), tuple(deps))


# ---- the modules ----


# fmt: off
_COMPUTE = ["arange", "cast", "cdiv", "convert_layout", "expand_dims", "fma", "full", "load", "maximum", "minimum",
            "store", "where", "zeros", *(["clamp"] if hasattr(real_gl, "clamp") else [])]
_RESHAPE = ["broadcast", "permute", "ravel", "reshape"]
_REDUCE = ["max", "min", "reduce", "sum"]
_METHODS = {"cast": arithmetic.cast, "cdiv": arithmetic.cdiv, "expand_dims": arithmetic.expand_dims,
            "trans": shapes.trans, "broadcast_to": shapes.broadcast_to}
_TYPES = ["int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float8e5", "float8e4nv",
          "float16", "bfloat16", "float32", "float64", "pointer_type", "block_type", "constexpr", "tensor", "tuple"]
_LAYOUTS = ["AutoLayout", "BlockedLayout", "CoalescedLayout", "DistributedLinearLayout", "DotOperandLayout",
            "NVMMADistributedLayout", "NVMMASharedLayout", "PaddedSharedLayout", "SliceLayout", "SwizzledSharedLayout"]
# fmt: on

gl = Namespace(
    "gl",
    {name: getattr(real_gl, name) for name in [*_TYPES, *_LAYOUTS] if hasattr(real_gl, name)}
    | {name: getattr(arithmetic, name) for name in _COMPUTE}
    | {name: getattr(shapes, name) for name in _RESHAPE}
    | {name: getattr(reductions, name) for name in _REDUCE}
    | {name: arithmetic.elementwise(name, function) for name, function in arithmetic.MATH.items()}
    | {
        "device_print": device_print,
        "to_tensor": as_value,
        "program_id": program_id,
        "num_programs": num_programs,
        "num_warps": lambda: current().num_warps,
        "num_ctas": lambda: 1,
        "static_assert": static_assert,
        "static_range": range,
        "static_print": print,
        "device_assert": device_assert,
        "assume": lambda cond: None,
        "multiple_of": lambda input, values: input,
        "max_contiguous": lambda input, values: input,
        "barrier": block_barrier,
        "thread_barrier": block_barrier,
        "warp_specialize": warp_specialize,
        "allocate_shared_memory": allocate_shared_memory,
    },
)

for _name in [*_RESHAPE[1:], *_REDUCE, *arithmetic.MATH]:
    setattr(Value, _name, gl._members[_name])
for _name, _function in _METHODS.items():
    setattr(Value, _name, _function)
Value.T = property(shapes.trans)  # type: ignore[attr-defined]

mbarrier = Namespace(
    "mbarrier",
    {
        "MBarrierLayout": MBarrierLayout,
        "allocate_mbarrier": allocate_mbarrier,
        "init": barrier_init,
        "invalidate": barrier_invalidate,
        "expect": barrier_expect,
        "arrive": barrier_arrive,
        "wait": barrier_wait,
    },
)

tma = Namespace(
    "tma",
    {
        "async_copy_global_to_shared": tma_load,
        "async_load": tma_load,
        "async_copy_shared_to_global": tma_store,
        "async_store": tma_store,
        "store_wait": store_wait,
        "make_tensor_descriptor": make_tensor_descriptor,
    },
)

hopper = Namespace(
    "hopper",
    {
        "tma": tma,
        "mbarrier": mbarrier,
        "fence_async_shared": fence_async_shared,
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
        "warpgroup_mma_init": lambda value: value,
    },
)

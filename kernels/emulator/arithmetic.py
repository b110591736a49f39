"""The functions of `gl` that compute: create and combine tensors, load and store through pointers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.language import _layouts as layouts

from kernels.emulator.global_memory import Touch
from kernels.emulator.memory import poison
from kernels.emulator.scheduler import current
from kernels.emulator.values import AUTO, Pointer, Value, bad_layout, binary, operands, same_layout, scalar, torch_type

# fmt: off
MATH: dict[str, Callable] = {"abs": torch.abs, "exp": torch.exp, "exp2": torch.exp2, "log": torch.log,
                             "log2": torch.log2, "rsqrt": torch.rsqrt, "sqrt": torch.sqrt}
# fmt: on


def as_value(x: Any) -> Value:
    return x if isinstance(x, Value) else scalar(x)


def make(data: torch.Tensor, layout: Any) -> Value:
    if any(size & (size - 1) for size in data.shape):
        raise bad_layout(f"a tensor of {list(data.shape)}: every size must be a power of two")
    layout = AUTO if layout is None else layout
    if layout != AUTO and (not isinstance(layout, layouts.DistributedLayout) or layout.rank != data.ndim):
        raise bad_layout(f"a tensor of {list(data.shape)} in {layout}", "wants a layout of registers, of that rank")
    _check_warps(layout)
    return Value(data, layout if data.ndim else AUTO)


def _check_warps(layout: Any) -> None:
    """Raises BadLayout where a layout is for other warps than those that run: the compiler refuses it."""
    if isinstance(layout, layouts.SliceLayout | layouts.DotOperandLayout):
        _check_warps(layout.parent)
    elif isinstance(layout, layouts.BlockedLayout | layouts.NVMMADistributedLayout):
        warps, running = math.prod(layout.warps_per_cta), current().num_warps
        if warps != running:
            raise bad_layout(f"{layout} is for {warps} warps, and {running} run this", "gl.num_warps() says how many")


def arange(start: int, end: int, layout: Any = None) -> Value:
    return make(torch.arange(start, end, dtype=torch.int32), layout)


def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Value:
    number = value.data if isinstance(value, Value) else torch.tensor(value)
    return make(number.to(torch_type(dtype)).expand([int(size) for size in shape]).clone(), layout)


def zeros(shape: Any, dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def where(condition: Any, x: Any, y: Any) -> Value:
    if not isinstance(x, Value) and not isinstance(y, Value):
        x = scalar(x)
    (a, b), _ = operands(x, y)
    chosen = as_value(condition)
    if len({t.ndim for t in (chosen.data, a, b)} - {0}) > 1:
        raise bad_layout("gl.where on tensors that differ in rank", "give all as many dimensions: x[:, None]")
    return Value(torch.where(chosen.data, a, b), same_layout([chosen, *(t for t in (x, y) if isinstance(t, Value))]))


def cdiv(x: Any, div: Any) -> Any:
    return (x + (div - 1)) // div


def minimum(x: Any, y: Any) -> Any:
    """Where one operand is NaN the result is the other, as on the GPU."""
    return binary(torch.fmin, x, y) if isinstance(x, Value) or isinstance(y, Value) else min(x, y)


def maximum(x: Any, y: Any) -> Any:
    """Where one operand is NaN the result is the other, as on the GPU."""
    return binary(torch.fmax, x, y) if isinstance(x, Value) or isinstance(y, Value) else max(x, y)


def elementwise(name: str, function: Callable) -> Callable:
    def apply(x: Any) -> Value:
        x = as_value(x)
        if name != "abs" and x.dtype != real_gl.float32:
            raise bad_layout(f"gl.{name} of {x.dtype}", "it takes fp32 alone: x.to(gl.float32)")
        return Value(function(x.data), x.layout)

    return apply


def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    return value.like(value.data, make(value.data, layout).layout)


def cast(input: Any, dtype: Any, fp_downcast_rounding: str | None = None, bitcast: bool = False) -> Value:
    return as_value(input).to(dtype, fp_downcast_rounding, bitcast)


def clamp(x: Any, min: Any, max: Any, propagate_nan: Any = None) -> Value:
    """In Gluon from triton 3.8 on. A NaN in x becomes a bound unless it is to be propagated; bf16 becomes fp32."""
    x, low, high = (v.to(real_gl.float32) if v.dtype == real_gl.bfloat16 else v for v in map(as_value, (x, min, max)))
    inside = minimum(maximum(x, low), high)
    return where(x == x, inside, x) if str(propagate_nan).endswith("ALL") else inside


def fma(x: Any, y: Any, z: Any) -> Value:
    (a, b, c), layout = operands(as_value(x), y, z)
    return Value(a * b + c, layout)


def expand_dims(input: Value, axis: int) -> Value:
    index: list[Any] = [slice(None)] * input.data.ndim
    index.insert(axis, None)
    return input[tuple(index)]


def load(pointer: Pointer, mask: Any = None, other: Any = None, *, cache_modifier="", eviction_policy="") -> Value:
    """Where the mask is not set: `other`, or what nothing computes by accident (NaN, the smallest integer)."""
    keep = _mask(pointer, mask)
    offsets = _touch(pointer, keep, "load from", write=False)
    data = torch.empty(keep.shape, dtype=pointer.memory.dtype)
    poison(data)
    if other is not None:
        same_layout([pointer, as_value(other)])
        data[...] = as_value(other).data.to(data.dtype)
    data[keep] = pointer.memory[offsets]
    return Value(data, pointer.layout)


def store(pointer: Pointer, value: Any, mask: Any = None, *, cache_modifier="", eviction_policy="") -> None:
    keep = _mask(pointer, mask)
    data = as_value(value)
    same_layout([pointer, data])
    content = data.data.to(pointer.memory.dtype).expand(keep.shape)[keep]
    pointer.memory[_touch(pointer, keep, "store to", write=True)] = content


def _touch(pointer: Pointer, keep: torch.Tensor, what: str, write: bool) -> torch.Tensor:
    """Records an access through a pointer; returns the offsets where the mask is set."""
    me = current()
    access = me.access(f"{what} {pointer.name}", write)
    offsets = pointer.checked_offsets(keep, access.event)
    if len(offsets):
        threads = (pointer.layout, pointer.data)
        first, last = int(offsets.min()), int(offsets.max())
        touch = Touch(pointer.name, access, first, last, lambda: offsets, threads, me.meetings)
        me.program.global_memory.touch(pointer.memory, touch)
    return offsets


def _mask(pointer: Pointer, mask: Any) -> torch.Tensor:
    if mask is None:
        return torch.ones(pointer.data.shape, dtype=torch.bool)
    same_layout([pointer, as_value(mask)])
    return as_value(mask).data.expand(pointer.data.shape)

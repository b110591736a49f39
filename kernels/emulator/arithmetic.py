"""The functions of `gl` that compute: create, combine and reduce tensors, load and store through pointers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon.language import _layouts as layouts

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
    return Value(data, layout if data.ndim else AUTO)


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


def elementwise(function: Callable) -> Callable:
    def apply(x: Any) -> Value:
        x = as_value(x)
        return Value(function(x.data), x.layout)

    return apply


def reduction(function: Callable) -> Callable:
    """A reduction: along `axis` the layout becomes a slice."""

    def reduce(input: Value, axis: int | None = None, *, keep_dims: bool = False) -> Value:
        x, rank = input.data, input.data.ndim
        if axis is None:
            return Value(function(x.flatten(), 0))
        if not -rank <= axis < rank:
            raise bad_layout(f"a reduction of {input.shape} along {axis}", f"wants an axis from {-rank} to {rank - 1}")
        axis %= rank
        data = function(x, axis)
        if keep_dims:
            return Value(data.unsqueeze(axis), input.layout)
        layout = AUTO if input.layout == AUTO or not data.ndim else layouts.SliceLayout(axis, input.layout)
        return Value(data, layout)

    return reduce


def total(x: torch.Tensor, axis: int) -> torch.Tensor:
    """A sum: bf16 in fp32, and small integers in int32, as Triton does."""
    if x.dtype == torch.bfloat16:
        return x.float().sum(axis)
    return x.sum(axis, dtype=x.dtype if x.dtype.is_floating_point or x.dtype == torch.int64 else torch.int32)


def largest(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Ignores NaN, as on the GPU."""
    return torch.where(x.isnan(), -torch.inf, x).amax(axis) if x.dtype.is_floating_point else x.amax(axis)


def smallest(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Ignores NaN, as on the GPU."""
    return torch.where(x.isnan(), torch.inf, x).amin(axis) if x.dtype.is_floating_point else x.amin(axis)


def convert_layout(value: Value, layout: Any, assert_trivial: bool = False) -> Value:
    return make(value.data, layout)


def cast(input: Any, dtype: Any) -> Value:
    return as_value(input).to(dtype)


def fma(x: Any, y: Any, z: Any) -> Value:
    (a, b, c), layout = operands(as_value(x), y, z)
    return Value(a * b + c, layout)


def expand_dims(input: Value, axis: int) -> Value:
    index: list[Any] = [slice(None)] * input.data.ndim
    index.insert(axis, None)
    return input[tuple(index)]


def load(pointer: Pointer, mask: Any = None, other: Any = 0.0, *, cache_modifier="", eviction_policy="") -> Value:
    event = current().event(f"load from {pointer.name}")
    keep = _mask(pointer, mask)
    data = torch.full(keep.shape, other.data.item() if isinstance(other, Value) else other).to(pointer.memory.dtype)
    data[keep] = pointer.memory[pointer.checked_offsets(keep, event)]
    return Value(data, pointer.layout)


def store(pointer: Pointer, value: Any, mask: Any = None, *, cache_modifier="", eviction_policy="") -> None:
    event = current().event(f"store to {pointer.name}")
    keep = _mask(pointer, mask)
    data = as_value(value)
    same_layout([pointer, data])
    pointer.memory[pointer.checked_offsets(keep, event)] = data.data.to(pointer.memory.dtype).expand(keep.shape)[keep]


def _mask(pointer: Pointer, mask: Any) -> torch.Tensor:
    if mask is None:
        return torch.ones(pointer.data.shape, dtype=torch.bool)
    same_layout([pointer, as_value(mask)])
    return as_value(mask).data.expand(pointer.data.shape)

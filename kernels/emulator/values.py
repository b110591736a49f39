"""Registers: every value of a kernel is a torch tensor with its Gluon type and layout.

Integers divide as in C, bf16 meets fp32 in fp32, and tensors combine only in one layout, as in Gluon.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _layouts as layouts

from kernels.emulator.reports import BadLayout, Event, NotModelled, OutOfBounds, here

AUTO = layouts.AutoLayout()
E4M3_LARGEST = 448.0

TORCH_TYPES = {
    gl.int1: torch.bool,
    gl.int8: torch.int8,
    gl.int16: torch.int16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.uint8: torch.uint8,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.float32: torch.float32,
    gl.float8e4nv: torch.float8_e4m3fn,
}
GLUON_TYPES = {torch_type: gluon_type for gluon_type, torch_type in TORCH_TYPES.items()}


def torch_type(dtype: Any) -> torch.dtype:
    """The torch type of a Gluon type."""
    if dtype not in TORCH_TYPES:
        raise NotModelled(f"the emulator does not know the type {dtype}; it knows {', '.join(map(str, TORCH_TYPES))}")
    return TORCH_TYPES[dtype]


def gluon_type(dtype: torch.dtype) -> Any:
    """The Gluon type of a torch type."""
    if dtype not in GLUON_TYPES:
        raise NotModelled(f"the emulator does not know the type {dtype}; it knows {', '.join(map(str, GLUON_TYPES))}")
    return GLUON_TYPES[dtype]


def bad_layout(what: str, cure: str = "") -> BadLayout:
    """A `BadLayout` report at the kernel's current line."""
    return BadLayout(what, [Event("here", here(), "compiler")], cure)


class Value:
    """A tensor in registers, or a scalar (no dimensions)."""

    def __init__(self, data: torch.Tensor, layout: Any = AUTO):
        self._data, self.layout = data, layout

    data = property(lambda self: self._data)  # overridden: an accumulator in flight cannot be read
    dtype = property(lambda self: gluon_type(self._data.dtype))
    shape = property(lambda self: list(self._data.shape))
    numel = property(lambda self: self._data.numel())
    type = property(lambda self: SimpleNamespace(shape=self.shape, layout=self.layout, element_ty=self.dtype))

    def __repr__(self) -> str:
        return f"Value({self.data})"

    def __bool__(self) -> bool:
        return bool(self._scalar("if, and, or, not"))

    def __index__(self) -> int:
        return int(self._scalar("as a number or a bound"))

    __int__ = __index__

    def _scalar(self, use: str) -> torch.Tensor:
        if self.shape:
            raise NotModelled(f"the emulator does not know {use} of a tensor, only of scalars; & | ~ and gl.where do")
        return self.data

    def like(self, data: torch.Tensor, layout: Any) -> Value:
        """Other data, as what this is."""
        return Value(data, layout)

    def to(self, dtype: Any, fp_downcast_rounding: str | None = None, bitcast: bool = False) -> Value:
        """The value in another type; e4m3 saturates at 448, as the GPU's conversion does. `bitcast` keeps the bits."""
        target = torch_type(dtype)
        data = self.data
        if fp_downcast_rounding not in (None, "rtne"):
            raise NotModelled(f"the emulator does not know rounding by {fp_downcast_rounding!r}, only to nearest")
        if bitcast:
            return Value(self._bits_as(dtype), self.layout)
        if target == torch.float8_e4m3fn:
            data = data.float().clamp(-E4M3_LARGEST, E4M3_LARGEST)
        return Value(data.to(target), self.layout)

    def _bits_as(self, dtype: Any) -> torch.Tensor:
        have, want = self.dtype.primitive_bitwidth, dtype.primitive_bitwidth
        if have != want:
            raise bad_layout(f"a bitcast from {self.dtype} to {dtype}: {have} bits are not {want}")
        return self.data.contiguous().view(torch_type(dtype))

    def __getitem__(self, index: Any) -> Value:
        """`x[:, None]`: a new dimension of one. The layout must be a SliceLayout along it, whose parent it becomes."""
        index = index if isinstance(index, tuple) else (index,)
        if any(i is not None and i != slice(None) for i in index):
            raise NotModelled("registers take the index None and : only, as in x[:, None]")
        layout = self.layout
        for axis in (axis for axis, i in enumerate(index) if i is None):
            layout = _unsliced(layout, axis)
        return self.like(self.data[index], layout)


class Pointer(Value):
    """Offsets into a tensor's memory, counted in elements."""

    def __init__(self, memory: torch.Tensor, data: torch.Tensor, layout: Any = AUTO, name: str = "pointer"):
        super().__init__(data, layout)
        self.memory, self.name = memory, name

    dtype = property(lambda self: gl.pointer_type(gluon_type(self.memory.dtype)))

    def __add__(self, offset: Any) -> Pointer:
        moved = binary(operator.add, Value(self.data, self.layout), offset)
        return Pointer(self.memory, moved.data.long(), moved.layout, self.name)

    __radd__ = __add__

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def like(self, data: torch.Tensor, layout: Any) -> Pointer:
        return Pointer(self.memory, data, layout, self.name)

    def checked_offsets(self, mask: torch.Tensor, event: Event) -> torch.Tensor:
        """The offsets where the mask is set."""
        offsets = self.data.expand(mask.shape)[mask]
        outside = offsets[(offsets < 0) | (offsets >= self.memory.numel())]
        if len(outside):
            what = f"{self.name} has {self.memory.numel()} elements, and element {int(outside[0])} is asked for"
            raise OutOfBounds(what, [event], "mask it: load and store take mask=…")
        return offsets


def pointer_to(tensor: torch.Tensor, name: str) -> Pointer:
    """A kernel's pointer argument."""
    gluon_type(tensor.dtype)  # refuses a type that Gluon does not have
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return Pointer(memory, torch.tensor(tensor.storage_offset()), AUTO, name)


def scalar(x: Any, dtype: torch.dtype | None = None) -> Value:
    """A run-time scalar: an int is int32 (int64 if it does not fit), a float fp32, as in Triton."""
    if dtype is None:
        dtype = torch.bool if isinstance(x, bool) else torch.float32 if isinstance(x, float) else torch.int32
        if dtype == torch.int32 and not -(2**31) <= x < 2**31:
            dtype = torch.int64
    return Value(torch.tensor(x, dtype=dtype))


def same_layout(values: list[Value]) -> Any:
    """The common layout of tensors. Scalars have none, and AutoLayout fits any."""
    found = [value.layout for value in values if value.data.ndim and value.layout != AUTO]
    if any(layout != found[0] for layout in found):
        cure = "gl.convert_layout brings one into the other's"
        raise bad_layout(f"tensors in different layouts meet: {' and '.join(map(str, found))}", cure)
    return found[0] if found else AUTO


def _unsliced(layout: Any, axis: int) -> Any:
    if layout == AUTO:
        return AUTO
    if not isinstance(layout, layouts.SliceLayout) or layout.dim != axis:
        cure = f"make it with gl.SliceLayout({axis}, …)"
        raise bad_layout(f"a dimension cannot be put in at {axis} of a tensor in {layout}", cure)
    return layout.parent


def operands(*xs: Any) -> tuple[list[torch.Tensor], Any]:
    """Tensors of one type that broadcast, and their layout. Plain Python numbers take the others' type."""
    values = [x for x in xs if isinstance(x, Value)]
    ranks = {value.data.ndim for value in values} - {0}
    if len(ranks) > 1:
        shapes = " and ".join(str(value.shape) for value in values)
        raise bad_layout(f"shapes {shapes} differ in rank", "give both as many dimensions: x[:, None]")
    for sizes in zip(*(value.shape for value in values if value.shape), strict=True):
        if len(set(sizes) - {1}) > 1:
            shapes = " and ".join(str(value.shape) for value in values)
            raise bad_layout(f"shapes {shapes} do not broadcast", "a dimension must be the same, or 1")
    dtype = values[0].data.dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.data.dtype)
    if any(isinstance(x, float) for x in xs) and not dtype.is_floating_point:
        dtype = torch.float32
    data = [x.data.to(dtype) if isinstance(x, Value) else torch.tensor(x, dtype=_fits(x, dtype)) for x in xs]
    return data, same_layout(values)


def _fits(x: Any, dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.bool and not isinstance(x, bool) else dtype


def binary(function: Any, a: Any, b: Any) -> Value:
    """An operator on two numbers of which at least one is a Value."""
    (x, y), layout = operands(a, b)
    return Value(function(x, y), layout)


def _divide_like_c(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.div(x, y, rounding_mode="trunc")


def _operator(function: Any, swapped: bool = False) -> Any:
    def method(self: Value, other: Any) -> Any:
        if isinstance(self, Pointer):
            raise NotModelled(f"the emulator does not know {function.__name__} of pointers, only + and - of offsets")
        if isinstance(other, Pointer):
            return NotImplemented
        return binary(function, other, self) if swapped else binary(function, self, other)

    return method


for _name, _function in {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": _divide_like_c,
    "mod": torch.fmod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}.items():
    setattr(Value, f"__{_name}__", _operator(_function))
    setattr(Value, f"__r{_name}__", _operator(_function, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(getattr(operator, _name)))
setattr(Value, "__neg__", lambda self: Value(-self.data, self.layout))  # noqa: B010
setattr(Value, "__invert__", lambda self: Value(~self.data, self.layout))  # noqa: B010
setattr(Value, "__hash__", object.__hash__)  # noqa: B010

"""Functions that change a tensor's shape: reshape, permute, broadcast. The new layout is the one that Gluon infers.

Gluon's compiler derives it, without a GPU: `inferred` builds the one operation and asks for its layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from triton._C.libtriton import ir
from triton._C.libtriton.gluon_ir import GluonOpBuilder
from triton.experimental.gluon import language as gl

from kernels.emulator.values import AUTO, Value, bad_layout, same_layout


def reshape(input: Value, *shape: Any) -> Value:
    """The same elements, row by row, in another shape: `reshape(x, 4, 8)` or `reshape(x, [4, 8])`."""
    sizes = _integers(shape)
    if math.prod(sizes) != input.numel:
        raise bad_layout(f"{input.shape} has {input.numel} elements, and {sizes} has {math.prod(sizes)}")
    return _changed(
        input, input.data.reshape(sizes), lambda b, x: b.create_reshape(x, sizes, False), ("reshape", *sizes)
    )


def ravel(x: Value) -> Value:
    """All elements in one dimension."""
    return reshape(x, [x.numel])


def permute(input: Value, *dims: Any) -> Value:
    """The dimensions in another order: `permute(x, 1, 0)` or `permute(x, [1, 0])`."""
    order = _integers(dims)
    if sorted(order) != list(range(len(input.shape))):
        raise bad_layout(f"{order} is no order of the {len(input.shape)} dimensions of {input.shape}")
    return _changed(input, input.data.permute(order), lambda b, x: b.create_trans(x, order), ("permute", *order))


def trans(input: Value, *dims: Any) -> Value:
    """`permute`, or with no dimensions named: the last two change places."""
    rank = len(input.shape)
    if not dims and rank < 2:
        raise bad_layout(f"trans of {input.shape}", "wants two dimensions at least")
    return permute(input, *(dims or [*range(rank - 2), rank - 1, rank - 2]))


def broadcast_to(input: Value, *shape: Any) -> Value:
    """Repeats along dimensions of one."""
    sizes, data = _integers(shape), input.data
    fits = data.ndim == len(sizes) and all(have in (1, want) for have, want in zip(data.shape, sizes, strict=True))
    if not fits:
        raise bad_layout(f"{input.shape} cannot be broadcast to {sizes}", "it wants as many dimensions, of 1 or equal")
    return input.like(data.expand(sizes), input.layout)


def broadcast(input: Value, other: Value) -> tuple[Value, Value]:
    """Both tensors in their common shape."""
    layout = same_layout([input, other])
    sizes = [max(sizes) for sizes in zip(input.shape or other.shape, other.shape or input.shape, strict=False)]
    return tuple(  # type: ignore[return-value]
        x.like(x.data.expand(sizes) if not x.shape else broadcast_to(x, sizes).data, layout) for x in (input, other)
    )


def _integers(xs: tuple) -> list[int]:
    return [int(x) for x in (xs[0] if len(xs) == 1 and isinstance(xs[0], list | tuple) else xs)]


def _changed(input: Value, data: Any, operation: Callable, key: tuple) -> Value:
    if not data.ndim or input.layout == AUTO:
        return input.like(data, AUTO)
    return input.like(data, _inferred(input.layout, tuple(input.shape), key, operation))


_layouts: dict[tuple, Any] = {}


def _inferred(layout: Any, shape: tuple[int, ...], key: tuple, operation: Callable) -> Any:
    """The layout that Gluon's compiler gives to the result of an operation on a tensor in `layout`."""
    where = (layout, shape, key)
    if where not in _layouts:
        context = ir.context()
        ir.load_dialects(context)
        builder = GluonOpBuilder(context)
        kind = gl.distributed_type(gl.float32, list(shape), layout).to_ir(builder)
        module = builder.create_module()
        function = builder.get_or_insert_function(module, "f", builder.get_function_ty([kind], []), "public", False)
        module.push_back(function)
        builder.set_insertion_point_to_start(function.add_entry_block())
        _layouts[where] = builder.get_gluon_layout_from_tensor(operation(builder, function.args(0)))
    return _layouts[where]

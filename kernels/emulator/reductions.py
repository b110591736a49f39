"""Reductions: pairs are combined, then pairs of the results, in the tensor's own type, as Gluon does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _layouts as layouts

from kernels.emulator.shapes import ravel
from kernels.emulator.values import AUTO, Value, bad_layout, same_layout


def reduce(input: Any, axis: int | None, combine_fn: Callable, keep_dims: bool = False) -> Any:
    """Combines all elements along `axis`, or all of them. The layout of the result is a slice of the tensor's.

    Args:
        input: a tensor, or several of one shape and layout as a tuple.
        combine_fn: takes two elements of each tensor (`a0, b0, a1, b1`) and returns one of each.
        keep_dims: whether the axis stays, with a length of one.
    """
    inputs = (input,) if isinstance(input, Value) else input

    def combine(*parts: torch.Tensor) -> list[torch.Tensor]:
        pair = combine_fn(*map(Value, parts))
        return [x.data for x in (pair if isinstance(pair, tuple) else (pair,))]

    results = _fold(inputs, axis, combine, keep_dims)
    return results[0] if isinstance(input, Value) else results


def _fold(inputs: tuple[Value, ...], axis: int | None, combine: Callable, keep_dims: bool) -> tuple[Value, ...]:
    """Combines the lower half along `axis` with the upper half until one is left. `combine` takes torch tensors."""
    shape, rank = inputs[0].shape, len(inputs[0].shape)
    same_layout(list(inputs))
    if any(x.shape != shape for x in inputs):
        raise bad_layout(f"a reduction of {' and '.join(str(x.shape) for x in inputs)}", "wants one shape")
    if axis is None:
        if keep_dims:
            raise bad_layout("a reduction of all axes with keep_dims", "name an axis: Gluon has no layout for the rest")
        return _fold(tuple(map(ravel, inputs)), 0, combine, False)
    if not -rank <= axis < rank:
        raise bad_layout(f"a reduction of {shape} along {axis}", f"wants an axis from {-rank} to {rank - 1}")
    axis %= rank
    parts = [x.data for x in inputs]
    while parts[0].shape[axis] > 1:
        lower, upper = zip(*(part.chunk(2, axis) for part in parts), strict=True)
        parts = combine(*lower, *upper)
    return tuple(_without(part, axis, x.layout, keep_dims) for part, x in zip(parts, inputs, strict=True))


def _without(data: torch.Tensor, axis: int, layout: Any, keep_dims: bool) -> Value:
    if keep_dims:
        return Value(data, layout)
    scalar_or_auto = layout == AUTO or data.ndim == 1
    return Value(data.squeeze(axis), AUTO if scalar_or_auto else layouts.SliceLayout(axis, layout))


def sum(input: Value, axis: int | None = None, keep_dims: bool = False, dtype: Any = None) -> Value:
    """Small integers are summed in int32; fp16 and bf16 are rounded at each addition."""
    small = not input.dtype.is_floating() and input.dtype.primitive_bitwidth < 32
    target = dtype or (gl.int32 if small else None)
    return _fold_one(input.to(target) if target else input, axis, torch.add, keep_dims)


def max(input: Value, axis: int | None = None, *, keep_dims: bool = False) -> Value:
    """Ignores NaN, as on the GPU. Types of fewer than 32 bits become fp32 or int32."""
    return _fold_one(_widened(input), axis, torch.fmax, keep_dims)


def min(input: Value, axis: int | None = None, *, keep_dims: bool = False) -> Value:
    """Ignores NaN, as on the GPU. Types of fewer than 32 bits become fp32 or int32."""
    return _fold_one(_widened(input), axis, torch.fmin, keep_dims)


def _widened(x: Value) -> Value:
    if x.dtype.primitive_bitwidth >= 32:
        return x
    return x.to(gl.float32 if x.dtype.is_floating() else gl.int32)


def _fold_one(x: Value, axis: int | None, function: Callable, keep_dims: bool) -> Value:
    return _fold((x,), axis, lambda a, b: [function(a, b)], keep_dims)[0]

"""`Checked`: descriptors of tensors, at the price of a check for each shape instead of each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Checked:
    """Makes tensor descriptors. Triton checks each new one, which takes longer than the rest of a launch.

    What was checked (all fields but the tensor) is kept for each shape, strides, dtype and block; the descriptor of a
    call is a new object with that call's tensor. So no descriptor holds an old address, and nothing keeps a tensor.
    The address has to be a multiple of 16, which nothing checks here after the first time.

    Args:
        make: a function (tensor, *block) -> descriptor.
        most: entries kept; then all are dropped.
    """

    def __init__(self, make: Callable[..., Any], most: int = 1024):
        self.make, self.most = make, most
        self.fields: dict[tuple, tuple[type, dict[str, Any]]] = {}

    def __call__(self, x: Tensor, *block: Any) -> Any:
        """The descriptor of x in blocks of `block`."""
        key = (x.shape, x.stride(), x.dtype, block)
        found = self.fields.get(key)
        if found is None:
            if len(self.fields) >= self.most:
                self.fields.clear()
            made = self.make(x, *block)
            found = self.fields[key] = type(made), {**vars(made), "base": None}
        kind, fields = found
        descriptor: Any = object.__new__(kind)
        descriptor.__dict__.update(fields, base=x)
        return descriptor

"""Tensors in HBM as an exercise hands them over: in rows, loaded and stored tile by tile, and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course.tasks.judge import call, extra_memory_below
from course.tasks.task import NotYet
from minillm.measure.traffic import Counted, Traffic


class Rows(Counted):
    """A matrix in HBM of which whole rows are loaded and stored.

    The bound on traffic in `tiling` assumes whole rows: parts of rows could meet more keys.

    Attributes:
        stored: (n,) bool, the rows that were stored.
    """

    def __init__(self, tensor: Tensor, name: str, traffic: Traffic):
        super().__init__(tensor, name, traffic)
        self.stored = torch.zeros(len(tensor), dtype=torch.bool)

    def load(self, *index: Any) -> Tensor:
        """Reads whole rows, counted."""
        if any(part != slice(None) for part in index[1:]):
            raise ValueError("load whole rows, as in q.load(slice(i, i + block_q))")
        return super().load(*index)

    def store(self, tile: Tensor, *index: Any) -> None:
        """Writes rows, counted, and notes which."""
        super().store(tile, *index)
        self.stored[index[:1]] = True


def call_in_tiles(function: Callable, *inputs: Any, cure: str, memory: int | None = None, too_much: str = "") -> Any:
    """The answer's result, where some of its inputs are `Rows`.

    Args:
        cure: what to do where the chip has no room for a tile.
        memory, too_much: bytes that the call may take, as in `extra_memory_below`. None: any number.
    """
    try:
        if memory is None:
            return call(function, *inputs)
        return extra_memory_below(memory, function, *inputs, too_much=too_much)
    except NotYet as complaint:
        if "need more than sram" not in str(complaint):
            raise
        raise NotYet(f"{complaint}\n{cure}: a score matrix, or all keys, would not fit either") from None

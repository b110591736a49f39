"""The grader's side of tensors in HBM: serves the loads and stores of a student's process, and counts them."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from grading.protocol import ProtocolError, decode, encode
from minillm.measure import Counted

MAX_LOADS = 100_000  # loads and stores in a call
MAX_HELD = 512 << 20  # bytes of tiles that a function holds at a time


def handle(value: Any, counted: list[Counted]) -> dict | None:
    """What is sent in place of a counted tensor, which is added to the list; None for any other value."""
    if not isinstance(value, Counted):
        return None
    counted.append(value)
    return {"handle": [len(counted) - 1, str(value.dtype).removeprefix("torch."), list(value.shape)]}


class TileServer:
    """Serves `load` and `store` for one call of a function.

    Args:
        counted: the tensors that the function was given, by the number of their handle.
    """

    def __init__(self, counted: list[Counted]):
        self.counted = counted
        self.tiles: dict[int, Tensor] = {}  # on the chip: the function holds them
        self.held = 0
        self._numbers = itertools.count()

    def free(self, numbers: Any) -> None:
        """Forgets tiles that the function no longer holds."""
        for number in numbers if isinstance(numbers, list) else ():
            self._forget(number)

    def serve(self, message: dict, blob: bytearray) -> tuple[dict, list[memoryview]]:
        """The reply to a request, and the bytes of its tile.

        Raises:
            ProtocolError: the request has not the right form, or the function holds too many tiles.
        """
        request = next(self._numbers)
        number = message.get("load", message.get("store"))
        if request >= MAX_LOADS:
            raise ProtocolError(f"more than {MAX_LOADS:,} loads and stores in a call")
        if type(number) is not int or not 0 <= number < len(self.counted):
            raise ProtocolError("a load or store of a tensor that it was not given")
        index = _index(decode(message.get("index"), bytearray()))
        tensor = self.counted[number]
        if "store" in message:
            tile = decode(message.get("tile"), blob)
            if isinstance(tile, (int, float)):
                tile = Tensor([tile])[0]
            if not isinstance(tile, Tensor):
                raise ProtocolError("a store of something that is no tensor")
        try:
            if "store" in message:
                tensor.store(tile, *index)
                return {"value": None}, []
            tile = tensor.load(*index)
        except (ValueError, IndexError, RuntimeError, TypeError) as error:
            return {"raised": [type(error).__name__, str(error)[:300]], "value": None}, []
        tree, blobs = encode(tile)
        self._hold(request, tile)
        return {"value": tree, "tile": request}, blobs

    def _hold(self, number: int, tile: Tensor) -> None:
        self.held += tile.nbytes
        if self.held > MAX_HELD:
            raise ProtocolError(f"it holds more than {MAX_HELD >> 20} MiB of tiles")
        self.tiles[number] = tile

    def _forget(self, number: Any) -> None:
        if type(number) is int and number in self.tiles:
            self.held -= self.tiles.pop(number).nbytes


def _index(index: Any) -> tuple:
    parts = index if isinstance(index, tuple) else (index,)
    allowed = all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)
    if len(parts) > 8 or not allowed:
        raise ProtocolError("an index that is more than ints, slices, ... and None")
    return parts

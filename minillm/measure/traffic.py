"""HBM traffic, counted while the code runs: what an algorithm reads, what it writes, and what it keeps on the chip.

Two ways to count, for two kinds of code:

- `count_traffic` for code that works in tiles. Its tensors lie in HBM as `Counted` tensors, which can do two things
  only: `load` a tile to the chip, and `store` one. `minillm.attention.tiled` is written so; a learner's own function
  is counted in the same way.
- `count_operators` for plain PyTorch: without fusion each operator reads its inputs from HBM and writes its result
  there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.measure.memory import format_bytes


class Traffic:
    """What was counted; every size in bytes, over all batches and heads together.

    Attributes:
        read, written: by the tensor's name.
        heads: by the tensor's name, how many (batch, head) pairs it has: query heads for q, out and lse, KV heads
            for k and v.
        sram: how much may be on the chip at a time, for each program that runs by itself; None is no limit.
        programs: how many such programs share the tiles: a (batch, KV head) pair each.
        peak_on_chip: the most that was on the chip at a time, for each program.
    """

    def __init__(self, sram: int | None = None):
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.heads: dict[str, int] = {}
        self.sram = sram
        self.programs = 1
        self.peak_on_chip = 0
        self._on_chip: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All bytes read and written."""
        return self.read.total() + self.written.total()

    def per_head(self, name: str) -> float:
        """Bytes of a tensor, read and written, for each (batch, head) pair of its own."""
        return (self.read[name] + self.written[name]) / self.heads[name]

    def __str__(self) -> str:
        names = dict.fromkeys((*self.read, *self.written))
        lines = [f"{'':6} {'read':>11} {'written':>11}"]
        lines += [f"{n:6} {format_bytes(self.read[n]):>11} {format_bytes(self.written[n]):>11}" for n in names]
        return "\n".join([*lines, f"in all {format_bytes(self.total)}, on the chip {format_bytes(self.peak_on_chip)}"])

    def tensor(self, name: str, tensor: Tensor, heads: int = 1) -> Counted:
        """Puts a tensor into HBM.

        Args:
            name: under which it is counted.
            tensor: any shape and dtype.
            heads: the (batch, head) pairs in it, for `per_head`.
        """
        self.heads[name] = heads
        return Counted(tensor, name, self)

    def hold(self, name: str, tile: Tensor) -> None:
        """Notes that a tensor is on the chip for as long as it lives.

        Raises:
            ValueError: where the chip has no room for it.
        """
        size = tile.numel() * tile.element_size() // self.programs
        in_all = self._on_chip.total() + size
        if self.sram is not None and in_all > self.sram:
            parts = Counter({name: size}) + self._on_chip
            held = ", ".join(f"{part} {format_bytes(part_size)}" for part, part_size in parts.items())
            raise ValueError(f"the tiles need more than sram {format_bytes(self.sram)} ({held}): make them smaller")
        self._on_chip[name] += size
        self.peak_on_chip = max(self.peak_on_chip, in_all)
        weakref.finalize(tile, self._release, name, size)

    def _release(self, name: str, size: int) -> None:
        self._on_chip[name] -= size


class Counted:
    """A tensor in HBM: nothing can be computed with it before it is loaded, tile by tile.

    Its `shape` and `dtype` are those of the tensor. Outside `count_traffic` nothing is counted, and a load is a view.
    """

    def __init__(self, tensor: Tensor, name: str = "", traffic: Traffic | None = None):
        self._tensor, self._name, self._traffic = tensor, name, traffic
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def load(self, *index: Any) -> Tensor:
        """Reads a tile, `tensor[index]`. It is on the chip for as long as you keep it.

        Raises:
            ValueError: where the chip has no room for it.
        """
        tile = self._tensor[index]
        if self._traffic is None:
            return tile
        tile = tile.clone()
        self._traffic.hold(self._name, tile)
        self._traffic.read[self._name] += tile.numel() * tile.element_size()
        return tile

    def store(self, tile: Tensor, *index: Any) -> None:
        """Writes a tile, `tensor[index] = tile`, in the tensor's dtype."""
        place = self._tensor[index]
        place.copy_(tile)
        if self._traffic is not None:
            self._traffic.written[self._name] += place.numel() * place.element_size()


_current: ContextVar[Traffic | None] = ContextVar("traffic", default=None)


@contextmanager
def count_traffic(sram: int | None = None) -> Iterator[Traffic]:
    """Counts what tiled code moves while the block runs.

    Args:
        sram: bytes that one program may keep on the chip; tiles that do not fit raise ValueError. None: no limit.

    Example:
        >>> x = torch.zeros(64, 16)
        >>> with count_traffic() as traffic:
        ...     (rows,) = in_hbm(x=x)
        ...     tile = rows.load(slice(0, 32))
        >>> traffic.read["x"]  # 32 rows of 16 numbers of 4 bytes
        2048
    """
    traffic = Traffic(sram)
    token = _current.set(traffic)
    try:
        yield traffic
    finally:
        _current.reset(token)


def in_hbm(heads: dict[str, int] | None = None, programs: int = 1, **tensors: Tensor) -> list[Counted]:
    """The tensors of a tiled algorithm, counted where `count_traffic` is on.

    Args:
        heads: the (batch, head) pairs of each tensor, by name.
        programs: how many programs, one to a (batch, KV head) pair, share each tile.
        tensors: by the name under which they are counted.
    """
    traffic = _current.get()
    if traffic is None:
        return [Counted(tensor) for tensor in tensors.values()]
    traffic.programs = programs
    return [traffic.tensor(name, tensor, (heads or {}).get(name, 1)) for name, tensor in tensors.items()]


def on_chip(**tiles: Tensor) -> None:
    """Notes tensors that are made on the chip, such as scores; costs nothing where nothing is counted."""
    traffic = _current.get()
    if traffic is not None:
        for name, tile in tiles.items():
            traffic.hold(name, tile)


def count_operators(function: Callable, *args: Any, **kwargs: Any) -> list[tuple[str, int, int]]:
    """What an unfused PyTorch function moves: each operator reads its inputs from HBM and writes its result there.

    Args:
        function: called once, with these arguments. Views move nothing and are left out.

    Returns:
        (operator, bytes read, bytes written) in the order of the calls.

    Example:
        >>> count_operators(lambda x: x.exp() + 1, torch.zeros(1000))
        [('exp', 4000, 4000), ('add', 4000, 4000)]
    """
    with _Operators() as operators:
        function(*args, **kwargs)
    return operators.calls


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "_unsafe_view", "detach"):
            self.calls.append((name, _bytes((args, kwargs)), _bytes(result)))
        return result


def _bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(tensors) if isinstance(x, Tensor))

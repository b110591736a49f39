"""Messages between the grader and a student's process: values only, and decoding runs no code.

A message is a frame: the sizes of its two parts, a JSON header, and the bytes of its tensors. Numbers, None, short
strings, tensors, and tuples and lists of those are values; everything else is refused. The grader trusts no message:
`decode` checks every field, and checks each size before it allocates.

The student's process uses this file too, so it imports the standard library and torch alone.
"""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_HEADER = 4 << 20  # bytes of JSON: the source of a notebook's cells goes over in one
MAX_BYTES = 256 << 20  # of all tensors in a message, together
MAX_ITEMS = 4096  # in a tree
MAX_DEPTH = 8
MAX_TEXT = 20_000  # characters

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ProtocolError(Exception):
    """An invalid message: cut short, too large, or not of the form above."""


class NotAValue(TypeError):
    """Something that cannot be sent, such as a NumPy array or a model."""


class Channel:
    """Sends and receives frames over a socket, each by a deadline that the other side cannot extend."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self._socket = connection
        self._came = bytearray()  # read from the socket, not yet returned

    def send(self, message: dict[str, Any], blobs: list[memoryview] | None = None, seconds: float = math.inf) -> None:
        """Sends a JSON object, and bytes beside it.

        Raises:
            TimeoutError: the other side does not read.
            ConnectionError: it has closed the connection.
        """
        header = json.dumps(message, allow_nan=False).encode()
        blobs = blobs or []
        deadline = time.monotonic() + seconds
        start = struct.pack(">IQ", len(header), sum(blob.nbytes for blob in blobs)) + header
        for part in (memoryview(start), *blobs):
            self._send(part, deadline)

    def receive(self, seconds: float = math.inf) -> tuple[dict[str, Any], bytearray]:
        """The next JSON object, and the bytes that came beside it.

        Raises:
            TimeoutError: the message was not complete in time.
            ConnectionError: the other side has closed the connection.
            ProtocolError: not a valid frame.
        """
        deadline = time.monotonic() + seconds
        if seconds <= 0:  # `_wait` checks the deadline, but is not called where data is always ready
            raise TimeoutError
        header_size, size = struct.unpack(">IQ", self._receive(12, deadline))
        if header_size > MAX_HEADER or size > MAX_BYTES:
            raise ProtocolError(f"a message of {header_size + size:,} bytes; at most {MAX_BYTES:,} may be sent")
        header, blob = self._receive(header_size, deadline), self._receive(size, deadline)
        try:
            message = json.loads(header)
        except (ValueError, RecursionError):
            raise ProtocolError("a message that is not JSON") from None
        if not isinstance(message, dict):
            raise ProtocolError("a message that is not an object")
        return message, blob

    def _send(self, data: memoryview, deadline: float) -> None:
        while data:
            try:
                data = data[self._socket.send(data[: 1 << 20]) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)

    def _receive(self, size: int, deadline: float) -> bytearray:
        data = bytearray(size)
        count = min(size, len(self._came))
        data[:count] = self._came[:count]
        del self._came[:count]
        while count < size:
            try:
                count += self._read_some(memoryview(data)[count:])
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
        return data

    def _read_some(self, rest: memoryview) -> int:
        """Fills the beginning of `rest`; further bytes are kept for the next call. Returns the number filled."""
        if len(rest) >= 1 << 16:
            count = self._socket.recv_into(rest)
        else:
            came = self._socket.recv(1 << 16)
            count = min(len(came), len(rest))
            rest[:count] = came[:count]
            self._came += came[count:]
        if not count:
            raise ConnectionError("the other side is gone")
        return count

    def _wait(self, event: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        ready = select.poll()
        ready.register(self._socket, event)
        ready.poll(None if math.isinf(left) else left * 1000)


def encode(value: Any, handle: Callable[[Any], dict | None] = lambda value: None) -> tuple[Any, list[memoryview]]:
    """A value as JSON, and the bytes of its tensors in the order in which they stand in it.

    Args:
        value: a number, a bool, None, a string, a tensor, an index (slice, Ellipsis), or tuples and lists of those.
        handle: for objects that stay on this side: their JSON, or None where the value is not one of them.

    Raises:
        NotAValue: for everything else.
    """
    blobs: list[memoryview] = []
    return _encode(value, handle, blobs), blobs


def _encode(value: Any, handle: Callable[[Any], dict | None], blobs: list[memoryview]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise NotAValue("an int of more than 64 bits")
        return int(value)
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise NotAValue(f"a string of {len(value):,} characters")
        return str(value)
    if isinstance(value, Tensor):
        return _encode_tensor(value, blobs)
    if isinstance(value, (tuple, list)):
        return {"list" if isinstance(value, list) else "tuple": [_encode(item, handle, blobs) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(part, handle, blobs) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    found = handle(value)
    if found is None:
        raise NotAValue(f"an object of type {type(value).__name__}")
    return found


def _encode_tensor(tensor: Tensor, blobs: list[memoryview]) -> dict:
    tensor = tensor.detach()
    if tensor.dtype not in _NAMES:
        raise NotAValue(f"a tensor of dtype {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise NotAValue(f"a {tensor.layout} tensor on {tensor.device}")
    if tensor.numel():
        flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        blobs.append(memoryview(flat))
    return {"tensor": [_NAMES[tensor.dtype], list(tensor.shape), _layout(tensor)]}


def _layout(tensor: Tensor) -> list[int] | None:
    """The strides of a tensor that lies in another order than its shape (a transposed one), else None."""
    dense = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in dense:
        if stride != expected:
            return None  # with gaps or shared elements: it arrives contiguous
        expected *= size
    return None if tensor.is_contiguous() else list(tensor.stride())


def decode(tree: Any, blob: bytearray, handle: Callable[[Any], Any] | None = None) -> Any:
    """The value that `encode` was given; tensors share the blob's memory.

    Args:
        tree: JSON.
        blob: the bytes of its tensors, all of which must be used.
        handle: makes the objects of the other side; without it there are none.

    Raises:
        ProtocolError: at the first thing that is not as `encode` writes it.
    """
    decoder = _Decoder(blob, handle)
    try:
        value = decoder.value(tree, 0)
    except RuntimeError as error:  # torch refuses some shapes, such as [0, 2**39, 2**39]
        raise ProtocolError(str(error)[:200]) from None
    if decoder.used != len(blob):
        raise ProtocolError(f"{len(blob) - decoder.used} bytes that belong to no tensor")
    return value


class _Decoder:
    def __init__(self, blob: bytearray, handle: Callable[[Any], Any] | None):
        self.blob, self.handle = blob, handle
        self.used = self.items = 0

    def value(self, tree: Any, depth: int) -> Any:
        self.items += 1
        if self.items > MAX_ITEMS or depth > MAX_DEPTH:
            raise ProtocolError(f"more than {MAX_ITEMS} values, or nested more than {MAX_DEPTH} deep")
        if tree is None or isinstance(tree, bool):
            return tree
        if isinstance(tree, int):
            return _need(tree, -(2**63) <= tree < 2**63, "a number")
        if isinstance(tree, str):
            return _need(tree, len(tree) <= MAX_TEXT, "a string")
        _need(tree, isinstance(tree, dict) and len(tree) == 1, "a value")
        ((kind, content),) = tree.items()
        if kind == "handle" and self.handle is not None:
            return self.handle(content)
        if kind not in ("float", "list", "tuple", "tensor", "slice", "ellipsis"):
            raise ProtocolError(f"an unknown kind of value, {str(kind)[:40]!r}")
        return getattr(self, "_" + kind)(content, depth + 1)

    def _float(self, content: Any, depth: int) -> float:
        _need(content, isinstance(content, str) and len(content) < 40, "a float")
        try:
            return float.fromhex(content)
        except (ValueError, OverflowError):
            raise ProtocolError("a float that is none") from None

    def _list(self, content: Any, depth: int) -> list:
        _need(content, isinstance(content, list), "a list")
        return [self.value(item, depth) for item in content]

    def _tuple(self, content: Any, depth: int) -> tuple:
        return tuple(self._list(content, depth))

    def _slice(self, content: Any, depth: int) -> slice:
        parts = self._list(content, depth)
        _need(parts, len(parts) == 3 and all(part is None or type(part) is int for part in parts), "a slice")
        return slice(*parts)

    def _ellipsis(self, content: Any, depth: int) -> Any:
        return Ellipsis

    def _tensor(self, content: Any, depth: int) -> Tensor:
        _need(content, isinstance(content, list) and len(content) == 3, "a tensor")
        name, shape, strides = content
        _need(name, isinstance(name, str) and name in DTYPES, "a dtype")
        _need(shape, _are_sizes(shape), "a shape")
        dtype, count = DTYPES[name], math.prod(shape)
        size = count * dtype.itemsize
        if size > len(self.blob) - self.used:
            raise ProtocolError("a tensor that is larger than its bytes")
        start, self.used = self.used, self.used + size
        if not count:
            return torch.empty(shape, dtype=dtype)
        flat = _readable(self.blob, start, count, dtype).reshape(shape)
        if strides is None:
            return flat
        _need(strides, _are_sizes(strides) and len(strides) == len(shape), "strides")
        laid_out = torch.empty_strided(shape, strides, dtype=dtype)
        if _layout(laid_out) != strides:
            raise ProtocolError("strides that do not fit the shape")
        return laid_out.copy_(flat)


def _readable(blob: bytearray, start: int, count: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:  # a byte other than 0 and 1 is undefined behaviour in a bool tensor
        return torch.frombuffer(blob, dtype=torch.uint8, count=count, offset=start) != 0
    if start % dtype.itemsize:
        return torch.frombuffer(blob[start : start + count * dtype.itemsize], dtype=dtype)
    return torch.frombuffer(blob, dtype=dtype, count=count, offset=start)


def _are_sizes(sizes: Any) -> bool:
    return isinstance(sizes, list) and len(sizes) <= 16 and all(type(n) is int and 0 <= n < 2**40 for n in sizes)


def _need(value: Any, right: bool, what: str) -> Any:
    if not right:
        raise ProtocolError(f"{str(value)[:40]!r} is not {what}")
    return value

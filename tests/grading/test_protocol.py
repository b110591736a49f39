"""Values pass from process to process bit for bit, and nothing else is taken for one."""

from __future__ import annotations

import json
import socket
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grading.protocol import DTYPES, MAX_BYTES, Channel, NotAValue, ProtocolError, decode, encode

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=20))
TREES = st.recursive(SCALARS, lambda x: st.one_of(st.lists(x, max_size=3), st.tuples(x, x)), max_leaves=12)


def sent(value):
    tree, blobs = encode(value)
    return decode(json.loads(json.dumps(tree)), bytearray(b"".join(blobs)))


@given(TREES)
def test_numbers_and_their_trees_come_back_as_they_were(value):
    assert repr(sent(value)) == repr(value)  # repr tells True from 1, -0.0 from 0.0 and NaN from nothing


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 5), (4, 3, 2)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype, shape):
    tensor = (torch.randn(shape) * 100).to(dtype)
    back = sent([tensor, tensor])[1]
    assert back.dtype == dtype and back.shape == tensor.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_transposed_tensor_arrives_transposed_and_a_view_with_gaps_without_them():
    x = torch.randn(4, 5, 6)
    assert sent(x.transpose(0, 2)).stride() == x.transpose(0, 2).stride()
    assert sent(x[:, ::2]).is_contiguous()
    assert torch.equal(sent(x[:, ::2]), x[:, ::2])
    assert torch.equal(sent(x[:1].expand(4, 5, 6)), x[:1].expand(4, 5, 6))


def test_an_index_comes_back_as_it_was():
    index = (slice(1, None, 2), ..., None, 3)
    assert sent(index) == index


@pytest.mark.parametrize(
    "value", [object(), {"a": 1}, 2**63, "x" * 30_000, torch.zeros(2).to_sparse(), 1j], ids=lambda v: type(v).__name__
)
def test_what_is_no_value_is_not_sent(value):
    with pytest.raises(NotAValue):
        encode([value])


FORGED = [
    1.5,
    {},
    {"float": "1e9", "list": []},
    {"pickle": "gASVAAAA"},
    {"__class__": []},
    {"float": 1},
    {"float": "0x" + "f" * 50},
    {"tensor": ["float32", [2], None, 1]},
    {"tensor": ["float99", [1], None]},
    {"tensor": ["float32", [-1], None]},
    {"tensor": ["float32", [True], None]},
    {"tensor": ["float32", [2**40], None]},
    {"tensor": ["float32", [2**39, 2**39, 0], None]},
    {"tensor": ["float32", [1] * 17, None]},
    {"tensor": ["float32", [2], [1000]]},
    {"tensor": ["float32", [2], [0]]},
    {"tensor": ["float32", [1], None]},
    {"slice": [1, 2]},
    {"slice": [1, 2, "3"]},
    {"handle": [0, "float32", [2]]},
    2**70,
    "x" * 30_000,
    {"list": [0] * 5000},
    json.loads('{"list": [' * 20 + "]}" * 20),
]


@pytest.mark.parametrize("tree", FORGED, ids=lambda tree: json.dumps(tree)[:40])
def test_a_forged_value_is_refused(tree):
    with pytest.raises(ProtocolError):
        decode(tree, bytearray(8))


@given(
    st.recursive(st.one_of(SCALARS, st.floats()), lambda x: st.dictionaries(st.text(), x) | st.lists(x)), st.binary()
)
def test_whatever_comes_is_a_value_or_refused(tree, blob):
    try:
        value = decode(tree, bytearray(blob))
    except ProtocolError:
        return
    assert repr(sent(value)) == repr(value)


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack(">IQ", 10, MAX_BYTES + 1),
        struct.pack(">IQ", 2**32 - 1, 0),
        struct.pack(">IQ", 3, 0) + b"[1]",
        struct.pack(">IQ", 3, 0) + b"{,}",
        struct.pack(">IQ", 50_000, 0) + b"[" * 50_000,
    ],
    ids=["too many bytes", "too long a header", "no object", "no JSON", "too deep"],
)
def test_a_forged_frame_is_refused(frame):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame)
        with pytest.raises(ProtocolError):
            Channel(ours).receive(5)


def test_a_frame_that_never_ends_is_waited_for_no_longer_than_said():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">IQ", 100, 0) + b"{")
        with pytest.raises(TimeoutError):
            Channel(ours).receive(0.05)
        theirs.close()
        with pytest.raises(ConnectionError):
            Channel(ours).receive(5)


def test_a_reader_that_does_not_read_is_waited_for_no_longer_than_said():
    ours, theirs = socket.socketpair()
    _, blobs = encode(torch.zeros(1 << 22))
    with ours, theirs, pytest.raises(TimeoutError):
        Channel(ours).send({}, blobs, 0.05)

"""Reductions, shapes and bits beside torch's results; their types and layouts beside Gluon's own compiler's."""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.compiling import compile_kernels
from kernels.emulator import BadLayout, NotModelled, arithmetic, emulate
from kernels.emulator.values import Value
from kernels.hopper.jobs import job_of
from minillm.measure import assert_within_budget
from tests.emulator.kernels import ROW, TILE

TRANSPOSED = gl.constexpr(gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1]))
SPLIT = gl.constexpr(gl.BlockedLayout([1, 1, 4], [4, 1, 8], [4, 1, 1], [2, 1, 0]))


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def later_larger(a, i, b, j):
    """The larger value and its place."""
    first = a >= b
    return gl.where(first, a, b), gl.where(first, i, j)


@gluon.jit
def places_of(ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    return rows[:, None] * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def reduce_kernel(x_ptr, out_ptr, WHAT: gl.constexpr):
    """One number for each of 32 rows of 64."""
    x = gl.load(x_ptr + places_of(32, 64, TILE))
    if WHAT == "sum":
        y = x.sum(1)
    elif WHAT == "max":
        y = x.max(axis=-1)
    elif WHAT == "min":
        y = x.min(1, keep_dims=True).reshape([32])
        y = gl.convert_layout(y, gl.SliceLayout(1, TILE))
    elif WHAT == "reduce":
        y = gl.reduce(x, 1, add)
    elif WHAT == "argmax":
        columns = gl.arange(0, 64, gl.SliceLayout(0, TILE))[None, :] + gl.zeros([32, 64], gl.int32, TILE)
        _, y = gl.reduce((x, columns), 1, later_larger)
    elif WHAT == "all":
        y = x.sum() + gl.zeros([32], gl.float32, gl.SliceLayout(1, TILE))
    gl.store(out_ptr + gl.arange(0, 32, gl.SliceLayout(1, TILE)), y)


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "reduce": lambda x: x.sum(1),
    "argmax": lambda x: x.argmax(1).to(x.dtype),
    "all": lambda x: x.sum().expand(32),
}


@pytest.mark.parametrize("what", REDUCTIONS)
def test_a_reduction_is_within_the_budget_of_torch(what):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(32)
    emulate(reduce_kernel, (1,), x, out, what)
    assert_within_budget(out, REDUCTIONS[what](x), REDUCTIONS[what](x.double()))


@gluon.jit
def types_kernel(out_ptr):
    x = gl.full([32, 64], 1.0, gl.float32, TILE)
    gl.static_assert(gl.max(x.to(gl.float16), 0).dtype == gl.float32)
    gl.static_assert(gl.min(x.to(gl.bfloat16), 0).dtype == gl.float32)
    gl.static_assert(gl.sum(x.to(gl.bfloat16), 0).dtype == gl.bfloat16)
    gl.static_assert(gl.sum(x.to(gl.float16), 1).dtype == gl.float16)
    gl.static_assert(gl.sum(x.to(gl.int8), 1).dtype == gl.int32)
    gl.static_assert(gl.max(x.to(gl.int8), 1).dtype == gl.int32)
    gl.static_assert(gl.sum(x.to(gl.float16), 1, dtype=gl.float32).dtype == gl.float32)
    gl.static_assert(x.sum(1).type.layout == gl.SliceLayout(1, TILE))
    gl.static_assert(x.max(0, keep_dims=True).type.layout == TILE)
    gl.static_assert(x.trans().type.layout == TRANSPOSED)
    gl.static_assert(x.T.shape[0] == 64)
    gl.static_assert(gl.permute(x, 0, 1).type.layout == TILE)
    gl.static_assert(x.reshape([32, 1, 64]).type.layout == SPLIT)
    gl.static_assert(x.to(gl.int32, bitcast=True).dtype == gl.int32)
    a, b = gl.broadcast(x.sum(1)[:, None], x)
    gl.static_assert(a.shape == b.shape)
    gl.static_assert(a.type.layout == TILE)
    gl.device_print("sum", x.sum(1))
    gl.store(out_ptr, (a + b).sum() + x.exp2().log2().sqrt().min())


def test_types_and_layouts_are_those_that_the_kernel_claims():
    out = torch.zeros(1)
    emulate(types_kernel, (1,), out)
    assert out == 32 * 64 * 65 + 1


@gluon.jit
def half_sum_kernel(x_ptr, out_ptr):
    gl.store(out_ptr, gl.sum(gl.load(x_ptr + gl.arange(0, 4096, ROW)), 0).to(gl.float32))


def test_a_sum_in_half_precision_rounds_at_each_addition():
    """2048 + 1 is 2048 in fp16, and again; a sum in fp32 that is rounded once would be 2050."""
    x, out = torch.zeros(4096).half(), torch.zeros(1)
    x[0], x[2048], x[1024] = 2048, 1, 1
    emulate(half_sum_kernel, (1,), x, out)
    assert out == 2048


@gluon.jit
def shape_kernel(x_ptr, out_ptr, WHAT: gl.constexpr):
    """32 × 64 to 2,048 numbers in the order of the new shape."""
    x = gl.load(x_ptr + places_of(32, 64, TILE))
    if WHAT == "trans":
        y = x.trans()
    elif WHAT == "permute":
        y = gl.permute(x.reshape(32, 16, 4), [2, 0, 1])
    elif WHAT == "reshape":
        y = x.reshape([8, 4, 64])
    elif WHAT == "broadcast":
        y, _ = gl.broadcast(gl.max(x, 0)[None, :], x)
    elif WHAT == "broadcast_to":
        y = x.max(1)[:, None].broadcast_to(32, 64)
    y = gl.convert_layout(gl.ravel(y) if WHAT == "permute" else y.reshape([2048]), ROW)
    gl.store(out_ptr + gl.arange(0, 2048, ROW), y)


SHAPES = {
    "trans": lambda x: x.T,
    "permute": lambda x: x.reshape(32, 16, 4).permute(2, 0, 1),
    "reshape": lambda x: x,
    "broadcast": lambda x: x.amax(0).expand(32, 64),
    "broadcast_to": lambda x: x.amax(1, keepdim=True).expand(32, 64),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_shape_is_changed_as_in_torch(what):
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(2048)
    emulate(shape_kernel, (1,), x, out, what)
    assert torch.equal(out, SHAPES[what](x).flatten())


@gluon.jit
def bits_kernel(x_ptr, out_ptr, TYPE: gl.constexpr):
    places = gl.arange(0, 128, ROW)
    gl.store(out_ptr + places, gl.cast(gl.load(x_ptr + places), TYPE, bitcast=True))


@pytest.mark.parametrize("source, target, word", [
    (torch.float32, torch.int32, gl.int32), (torch.int16, torch.bfloat16, gl.bfloat16),
    (torch.float8_e4m3fn, torch.uint8, gl.uint8),
])  # fmt: skip
def test_a_bitcast_keeps_the_bits(source, target, word):
    x = torch.randn(128, generator=torch.Generator().manual_seed(0)).mul(100).to(source)
    out = torch.zeros(128).to(target)
    emulate(bits_kernel, (1,), x, out, word)
    assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))


@gluon.jit
def print_kernel():
    gl.device_print("the tile:", gl.arange(0, 4, gl.BlockedLayout([1], [32], [4], [0])), gl.program_id(0))


def test_device_print_shows_the_tensor_and_the_program(capsys):
    emulate(print_kernel, (2,))
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "program (1, 0, 0), all warps: the tile: tensor([0, 1, 2, 3], dtype=torch.int32) 1"
    assert len(shown) == 2


def test_clamp_is_that_of_triton_3_8():
    x = Value(torch.tensor([-2.0, 0.5, 9.0, torch.nan]))
    assert arithmetic.clamp(x, -1.0, 1.0).data.tolist() == [-1, 0.5, 1, -1]
    kept = arithmetic.clamp(x, -1.0, 1.0, propagate_nan="PropagateNan.ALL").data
    assert kept[:3].tolist() == [-1, 0.5, 1] and kept[3].isnan()
    assert arithmetic.clamp(x.to(gl.bfloat16), -1.0, 1.0).dtype == gl.float32


@gluon.jit
def clamp_kernel(x_ptr):
    gl.store(x_ptr, gl.clamp(gl.load(x_ptr), -1.0, 1.0))


def test_clamp_is_there_where_gluon_has_it():
    x = torch.full((1,), 9.0)
    if not hasattr(gl, "clamp"):
        with pytest.raises((NotModelled, AttributeError), match="clamp"):
            emulate(clamp_kernel, (1,), x)
    else:
        emulate(clamp_kernel, (1,), x)
        assert x == 1


@gluon.jit
def refused_kernel(WHAT: gl.constexpr):
    x = gl.full([32, 64], 1.0, gl.float32, TILE)
    if WHAT == "size":
        x.reshape([32, 32])
    elif WHAT == "order":
        x.permute(0, 0)
    elif WHAT == "broadcast":
        x.broadcast_to(64, 64)
    elif WHAT == "shapes":
        x + gl.full([32, 32], 1.0, gl.float32, TILE)
    elif WHAT == "layout":
        x + x.trans().reshape([32, 64])
    elif WHAT == "bits":
        x.to(gl.float16, bitcast=True)
    elif WHAT == "axis":
        x.sum(2)
    elif WHAT == "all axes":
        gl.sum(x, keep_dims=True)
    elif WHAT == "transposed vector":
        x.sum(1).trans()
    elif WHAT == "warps":
        gl.zeros([32, 64], gl.float32, gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))
    elif WHAT == "sliced warps":
        gl.arange(0, 64, gl.SliceLayout(0, gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])))
    elif WHAT == "half":
        gl.exp(x.to(gl.float16))


REFUSED = {
    "size": r"\[32, 64\] has 2048 elements, and \[32, 32\] has 1024",
    "order": r"\[0, 0\] is no order of the 2 dimensions",
    "broadcast": r"\[32, 64\] cannot be broadcast to \[64, 64\]",
    "shapes": r"shapes \[32, 64\] and \[32, 32\] do not broadcast",
    "layout": "tensors in different layouts meet: BlockedLayout.* and DistributedLinearLayout",
    "bits": "a bitcast from fp32 to fp16: 32 bits are not 16",
    "axis": "along 2(.|\n)*wants an axis from -2 to 1",
    "all axes": "a reduction of all axes with keep_dims",
    "transposed vector": r"trans of \[32\]",
    "warps": "is for 8 warps, and 4 run this",
    "sliced warps": "is for 8 warps, and 4 run this",
    "half": r"gl\.exp of fp16(.|\n)*it takes fp32 alone",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_named_at_its_line(what):
    with pytest.raises(BadLayout, match=REFUSED[what]) as caught:
        emulate(refused_kernel, (1,), what)
    assert "test_shapes_and_reductions.py:" in str(caught.value)


def test_gluons_compiler_accepts_and_refuses_the_same():
    here = "tests.emulator.test_shapes_and_reductions"
    jobs = [job_of(f"{here}:types_kernel", [torch.zeros(1)], 4)]
    jobs += [job_of(f"{here}:refused_kernel", [what], 4) for what in REFUSED]
    fits, *rest = (report.failure for report in compile_kernels(jobs))
    assert not fits, fits
    assert all(rest), [what for what, failure in zip(REFUSED, rest, strict=True) if not failure]

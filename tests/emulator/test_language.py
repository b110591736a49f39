"""The emulator's `gl`, `tma` and `mbarrier` beside Gluon's: what they compute, what they refuse, and the messages."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
)
from triton.language.core import _aggregate as aggregate

from kernels.emulator import (
    BadLayout,
    FailedAssert,
    NotModelled,
    OutOfBounds,
    Unwritten,
    emulate,
    language,
)
from kernels.emulator.__main__ import main
from kernels.gluon_names import allocate_barriers, tma_load
from kernels.hopper import tile as shared_arithmetic
from tests.emulator.kernels import ROW, SHARED, SUMS, SWIZZLED, TILE, rows

ROOT = Path(__file__).resolve().parent.parent.parent


# ---- numbers ----


@gluon.jit
def numbers_kernel(a, b, out_ptr):
    gl.store(out_ptr, a // b)
    gl.store(out_ptr + 1, a % b)
    gl.store(out_ptr + 2, gl.cdiv(a, b))
    gl.store(out_ptr + 3, gl.maximum(a, b) * 2 - (a & 3))


def test_integers_divide_as_in_c():
    out = torch.zeros(4, dtype=torch.int32)
    emulate(numbers_kernel, (1,), -7, 2, out)
    assert out.tolist() == [-3, -1, -3, 3]


@gluon.jit
def softmax_kernel(x_ptr, out_ptr, columns, COLUMNS: gl.constexpr):
    row = gl.program_id(0)
    column = gl.arange(0, COLUMNS, ROW)
    x = gl.load(x_ptr + row * columns + column, mask=column < columns, other=float("-inf"))
    p = gl.exp(x - gl.max(x, 0))
    gl.store(out_ptr + row * columns + column, p / gl.sum(p, 0), mask=column < columns)


def test_pointers_masks_and_reductions_give_a_softmax():
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    out = torch.zeros_like(x)
    assert emulate(softmax_kernel, (5,), x, out, 100, 128).programs == 5
    assert (out.double() - torch.softmax(x.double(), 1)).abs().max() < 4 * torch.finfo(torch.float32).eps


@gluon.jit
def unmasked_kernel(x_ptr, COLUMNS: gl.constexpr):
    gl.store(x_ptr + gl.arange(0, COLUMNS, ROW), 0.0)


def test_a_pointer_past_the_end_is_named():
    with pytest.raises(OutOfBounds, match="x_ptr has 100 elements, and element 100 is asked for"):
        emulate(unmasked_kernel, (1,), torch.zeros(100), 128)


@gluon.jit
def saturate_kernel(x_ptr, out_ptr):
    columns = gl.arange(0, 4, ROW)
    gl.store(out_ptr + columns, gl.load(x_ptr + columns).to(gl.float8e4nv))


def test_e4m3_saturates():
    out = torch.zeros(4, dtype=torch.float8_e4m3fn)
    emulate(saturate_kernel, (1,), torch.tensor([1.0, 1000.0, -1000.0, 448.0]), out)
    assert out.float().tolist() == [1, 448, -448, 448]


@gluon.jit
def words_kernel(x_ptr, factors, out_ptr):
    scale, shift = factors
    rows = gl.arange(0, 16, gl.SliceLayout(1, TILE))
    columns = gl.arange(0, 16, gl.SliceLayout(0, TILE))
    places = gl.expand_dims(rows, 1) * 16 + gl.expand_dims(columns, 0)
    x = gl.load(x_ptr + 1 + places - 1)
    y = gl.fma(x - gl.min(x, axis=-1, keep_dims=True), scale, shift) + gl.zeros([16, 16], gl.float32, TILE)
    gl.barrier()
    gl.store(out_ptr + places, gl.cast(y, gl.float16))


def test_words_and_tuples_mean_what_they_do_in_torch():
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(16, 16).half()
    emulate(words_kernel, (1,), x, (3.0, 0.5), out)
    assert torch.equal(out, ((x - x.amin(1, keepdim=True)) * 3 + 0.5).half())


@gluon.jit
def other_module_kernel(out_ptr):
    gl.store(out_ptr, shared_arithmetic.count_key_tiles(0, 3, 9, 4, 4, True))


def test_a_function_may_be_called_through_its_module():
    out = torch.zeros(1, dtype=torch.int32)
    emulate(other_module_kernel, (1,), out)
    assert out.item() == 3


def test_functions_name_their_arguments_as_gluon_does():
    modules = [(language.gl, gl), (language.mbarrier, mbarrier), (language.tma, tma), (language.hopper, hopper)]
    compared = 0
    for namespace, module in modules:
        for name, function in namespace._members.items():
            real = getattr(getattr(module, name, None), "fn", getattr(module, name, None))
            if inspect.isfunction(function) and inspect.isfunction(real):
                names = [n for n in inspect.signature(real).parameters if not n.startswith("_")]
                ours = inspect.signature(function).parameters.values()
                by_place = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
                others = {p.name for p in ours if p.kind is p.KEYWORD_ONLY}
                if names != ["args", "kwargs"]:  # a name that triton 3.9 has removed
                    compared += 1
                    for our, their in zip(by_place, names, strict=False):
                        assert their == our or their in others, f"{name}: {our} is {their} in Gluon"
    assert compared > 30


# ---- what does not fit ----


@gluon.jit
def two_layouts_kernel():
    gl.arange(0, 128, ROW) + gl.arange(0, 128, gl.SliceLayout(0, TILE))


@gluon.jit
def wrong_slice_kernel():
    gl.arange(0, 16, gl.SliceLayout(0, TILE))[:, None]


@gluon.jit
def not_a_power_of_two_kernel():
    gl.arange(0, 100, ROW)


@gluon.jit
def registers_kernel():
    a = gl.full([64, 64], 1.0, gl.float16, TILE)
    b = gl.allocate_shared_memory(gl.float16, [64, 64], SWIZZLED)
    warpgroup_mma(a, b, gl.full([64, 64], 0.0, gl.float32, SUMS))


@gluon.jit
def other_block_kernel(source):
    tile = gl.allocate_shared_memory(source.dtype, [32, 64], source.layout)
    tma_load(source, [0, 0], allocate_barriers(1, 1).index(0), tile)


@gluon.jit
def descriptor_kernel(x_ptr, stride, COLUMNS: gl.constexpr, TRANSPOSED: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2, TRANSPOSED)
    tma.make_tensor_descriptor(x_ptr, [8, 60], [stride, 1], [8, COLUMNS], layout)


@pytest.mark.parametrize(
    "kernel, arguments, message",
    [
        (two_layouts_kernel, (), "tensors in different layouts meet: BlockedLayout.* and SliceLayout"),
        (wrong_slice_kernel, (), "a dimension cannot be put in at 1 .*\n.*\n.*make it with gl.SliceLayout"),
        (not_a_power_of_two_kernel, (), "every size must be a power of two"),
        (registers_kernel, (), "a of warpgroup_mma, in registers, is in BlockedLayout"),
        (
            other_block_kernel,
            rows(torch.zeros(16, 64).half()),
            r"the descriptor's block has the shape \[16, 64\], tile \[32, 64\]",
        ),
        (descriptor_kernel, (torch.zeros(8, 64).half(), 60, 64, False), "strides in multiples of 16 bytes"),
        (descriptor_kernel, (torch.zeros(8, 64).half(), 64, 4, False), "a block of at least 16 bytes"),
        (descriptor_kernel, (torch.zeros(8, 64).half(), 64, 64, True), "a layout that is not transposed"),
    ],
)
def test_what_the_compiler_or_the_gpu_would_refuse_is_named(kernel, arguments, message):
    with pytest.raises(BadLayout, match=message):
        emulate(kernel, (1,), *arguments)


@gluon.jit
def product_kernel(
    TYPE: gl.constexpr, ROWS: gl.constexpr, DEPTH: gl.constexpr, SWIZZLE: gl.constexpr, WARPS: gl.constexpr,
    COLUMNS: gl.constexpr, SUM: gl.constexpr,
):  # fmt: skip
    bits: gl.constexpr = TYPE.primitive_bitwidth
    a = gl.allocate_shared_memory(TYPE, [ROWS, DEPTH], gl.NVMMASharedLayout(SWIZZLE, bits, 2))
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], WARPS, [16, COLUMNS, 256 // bits])
    warpgroup_mma(a, a.permute((1, 0)), gl.full([ROWS, ROWS], 0, SUM, layout))


@pytest.mark.parametrize(
    "arguments, report, message",
    [
        ((gl.float16, 128, 64, 128, [8, 1], 128, gl.float32), BadLayout, "is for 8 warps, and 4 run this"),
        ((gl.float16, 64, 64, 128, [2, 2], 32, gl.float32), BadLayout, "a multiple of 4 along the rows"),
        ((gl.float16, 32, 64, 128, [4, 1], 32, gl.float32), BadLayout, "does not fit a product of 32 × 32"),
        ((gl.float16, 64, 64, 128, [4, 1], 48, gl.float32), BadLayout, r"\[16, 48, 16\] does not fit a product of 64"),
        ((gl.float16, 64, 64, 128, [4, 1], 4, gl.float32), BadLayout, r"\[16, 4, 16\] does not fit a product of 64"),
        ((gl.float16, 64, 8, 32, [4, 1], 64, gl.float32), BadLayout, "does not fit a product of 64 × 64 × 8"),
        ((gl.float16, 64, 64, 0, [4, 1], 64, gl.float32), BadLayout, "with a swizzle of 32 bytes at least"),
        ((gl.bfloat16, 64, 64, 128, [4, 1], 64, gl.bfloat16), BadLayout, "bf16 sums in fp32, not in bf16"),
        ((gl.bfloat16, 64, 64, 128, [4, 1], 64, gl.float16), BadLayout, "bf16 sums in fp32, not in fp16"),
        ((gl.float16, 64, 64, 128, [4, 1], 64, gl.int32), BadLayout, "fp16 sums in fp32 or fp16, not in int32"),
        ((gl.float32, 64, 64, 128, [4, 1], 64, gl.float32), NotModelled, "would be rounded to TF32"),
        ((gl.float16, 64, 64, 128, [4, 1], 64, gl.float16), Unwritten, "nothing was written there"),  # fits
    ],
)
def test_products_that_the_compiler_would_refuse_are_named(arguments, report, message):
    with pytest.raises(report, match=message):
        emulate(product_kernel, (1,), *arguments)


@aggregate
class Pair:
    first: gl.tensor

    @gluon.constexpr_function
    def __init__(self, first):
        self.first = first


@gluon.jit
def aggregate_kernel(x_ptr):
    gl.store(x_ptr, Pair(gl.load(x_ptr)).first)


@gluon.jit
def unknown_kernel(x_ptr, WHAT: gl.constexpr):
    x = gl.arange(0, 128, ROW)
    if WHAT == "name":
        gl.histogram(x, 16)
    elif WHAT == "method":
        x.cumsum(0)
    elif WHAT == "argument":
        gl.load(x_ptr, volatile=True)
    elif WHAT == "operator":
        gl.store(x_ptr * 2, 0)
    elif WHAT == "and":
        gl.where((x > 0) and (x < 9), x, 0)
    elif WHAT == "type":
        x.to(gl.float8e5)
    elif WHAT == "imported":
        async_copy.wait_group(0)
    elif WHAT == "memory":
        gl.allocate_shared_memory(gl.float32, [16, 16], SHARED).gather(x, 0)


@pytest.mark.parametrize(
    "kernel, arguments, message",
    [
        (
            unknown_kernel,
            ("name",),
            r"know gl\.histogram.*\n  test_language.py:\d+ in unknown_kernel: gl\.histogram\(x, 16\)",
        ),
        (unknown_kernel, ("method",), r"no attribute 'cumsum'\n  test_language.py:\d+ .*: x\.cumsum\(0\)"),
        (
            unknown_kernel,
            ("argument",),
            r"keyword argument 'volatile'\n.*gl\.load\(x_ptr, volatile=True\)",
        ),
        (unknown_kernel, ("operator",), r"does not know mul of pointers.*\n.*gl\.store\(x_ptr \* 2, 0\)"),
        (unknown_kernel, ("and",), r"does not know if, and, or, not of a tensor.*\n.*\(x > 0\) and \(x < 9\)"),
        (unknown_kernel, ("type",), r"does not know the type fp8e5.*\n.*x\.to\(gl\.float8e5\)"),
        (unknown_kernel, ("imported",), r"does not know async_copy\.wait_group.*\n.*async_copy\.wait_group\(0\)"),
        (unknown_kernel, ("memory",), "no attribute 'gather'"),
        (aggregate_kernel, (), r"does not know @aggregate, which makes Pair\n.*gl\.store\(x_ptr, Pair\("),
    ],
)
def test_what_is_not_modelled_is_named(kernel, arguments, message):
    with pytest.raises(NotModelled, match=message):
        emulate(kernel, (1,), torch.zeros(128), *arguments)


def test_a_type_that_is_not_modelled_is_named():
    with pytest.raises(NotModelled, match=r"does not know the type torch\.float64"):
        emulate(unmasked_kernel, (1,), torch.zeros(128).double(), 128)


@gluon.jit
def assert_kernel(x_ptr, STATIC: gl.constexpr):
    x = gl.load(x_ptr + gl.arange(0, 128, ROW))
    gl.device_assert(x > 0, "all are positive", mask=x < 5)
    gl.static_assert(STATIC, "STATIC is set")


def test_an_assertion_that_does_not_hold_is_named():
    emulate(assert_kernel, (1,), torch.ones(128), True)
    with pytest.raises(FailedAssert, match="device_assert all are positive"):
        emulate(assert_kernel, (1,), torch.zeros(128), True)
    with pytest.raises(FailedAssert, match="static_assert STATIC is set"):
        emulate(assert_kernel, (1,), torch.full((128,), 9.0), False)


def test_only_gluon_kernels_are_taken():
    with pytest.raises(TypeError, match=r"kernel is function, wants a function decorated with @gluon\.jit"):
        emulate(rows, (1,))
    with pytest.raises(TypeError, match="x_ptr is list"):
        emulate(unmasked_kernel, (1,), [1.0], 128)


# ---- as a whole ----


def test_the_emulator_runs_under_the_interpreters_variable_too():
    """Other kernels' tests set TRITON_INTERPRET=1, and Gluon has no interpreter of its own."""
    command = [sys.executable, "-c", "from kernels.emulator.__main__ import main; main()"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "in 51 orders: right is True" in child.stdout and "missing fence: on tile" in child.stdout


def test_the_module_shows_an_example(capsys):
    main()
    shown = capsys.readouterr().out
    assert "right is True" in shown and "missing fence: on tile" in shown

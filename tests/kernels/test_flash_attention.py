"""The Triton kernel against float64: on the GPU where there is one, else in the interpreter, at sizes that fit."""

import importlib.util
import itertools
import re
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from allpairspy import AllPairs

import kernels.flash_attention as flash
from course.lesson import assert_within_budget
from course.widgets import programs
from kernels import tuning
from kernels.flash_attention import MODE, Ragged, flash_attention, flash_attn_func, flash_attn_varlen_func
from minillm.attention import naive_attention
from minillm.attention.masks import Visibility
from tests.attention.grid import HEADDIMS, LONG_SEQLENS, SEQLENS, Judge, random_qkv

DEVICE = "cuda" if MODE.name == "gpu" else "cpu"
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (2, 1)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = [(113, 0), (1, 217), (0, 5), (64, 64), (40, 256)]  # (queries, keys) of a ragged batch's sequences


def on_device(q, k, v, return_lse=True, *, kernel=flash_attention, **options):
    """The kernel as `Judge` calls it: tensors come from the CPU and go back there."""
    out, lse = kernel(*(x.to(DEVICE) for x in (q, k, v)), **options)
    return out.cpu(), lse.cpu()


@dataclass(frozen=True)
class Case:
    seqlens: tuple[int, int]
    headdim: int
    heads: str
    causal: bool
    local: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        flags = ("-causal" if self.causal else "") + ("-local" if self.local else "")
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.seqlens[0]}x{self.seqlens[1]}-d{self.headdim}-{self.heads}{flags}-{name}"

    def check(self):
        window = (self.seqlens[1] // 3, self.seqlens[1] // 7) if self.local else (-1, -1)
        qkv = random_qkv(self.seqlens, HEADS[self.heads], self.headdim, self.dtype)
        Judge(qkv, causal=self.causal, window_size=window).check(on_device)


def cases() -> list[Case]:
    """flash-attn's grid: all of it on a GPU, every pair of values of any two factors in the interpreter."""
    lengths = SEQLENS if DEVICE == "cpu" else (*SEQLENS, *LONG_SEQLENS)
    factors = [lengths, HEADDIMS, list(HEADS), [False, True], [False, True], DTYPES]
    chosen = AllPairs(factors) if DEVICE == "cpu" else itertools.product(*factors)
    return [Case(*values) for values in chosen]


def test_the_grid_has_every_pair_and_is_small_enough_for_the_interpreter():
    found = cases()
    assert len({(case.seqlens, case.headdim) for case in found}) >= 66
    assert {(case.headdim, case.dtype) for case in found} == set(itertools.product(HEADDIMS, DTYPES))
    assert DEVICE == "cuda" or len(found) <= 80


@pytest.mark.parametrize("case", cases(), ids=str)
def test_forward_and_backward_are_within_the_budget(case):
    case.check()


def test_a_long_row_is_within_the_budget():
    """2048 keys in 32 tiles: an error that grows with each rescale would show."""
    Judge(random_qkv((130, 2048), (1, 1), 64), causal=True).check(on_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_thirty_times_as_large_are_within_the_budget(dtype):
    Judge(random_qkv((64, 217), (2, 1), 64, dtype, magnitude=30), causal=True, multiple=8).check(on_device)


@pytest.mark.parametrize("softcap", [0.5, 20.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap_is_within_the_budget(softcap, dtype):
    Judge(random_qkv((40, 101), (2, 1), 32, dtype), causal=True, softcap=softcap).check(on_device)


@pytest.mark.parametrize("seqlens", [(1, 1), (1, 9), (9, 1), (0, 5), (5, 0), (1, 339)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_and_one_row_inputs(seqlens, causal):
    Judge(random_qkv(seqlens, (4, 2), 16, torch.float16, batch=2), causal=causal).check(on_device)


@pytest.mark.parametrize("window_size", [(0, 0), (10, -1), (-1, 10), (100, 0), (300, 300)], ids=str)
@pytest.mark.parametrize("seqlens", [(60, 201), (201, 60)], ids=str)
def test_windows_whose_ends_fall_into_any_tile(window_size, seqlens):
    Judge(random_qkv(seqlens, (1, 1), 16), window_size=window_size).check(on_device)


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (128, 16), (32, 128)], ids=str)
def test_any_tile_size_gives_the_same(blocks):
    judge = Judge(random_qkv((37, 101), (2, 1), 16), causal=True, window_size=(40, -1))
    config = tuning.Config(*blocks, warps=4, stages=1)
    with tiles(config, 16, torch.float32):
        judge.check(on_device)


@contextmanager
def tiles(config, headdim, dtype):
    """All kernels with this configuration."""
    with ExitStack() as stack:
        for kernel in tuning.KERNELS:
            stack.enter_context(tuning.using(kernel, headdim, dtype, config))
        yield


def test_strides_are_read_and_not_assumed():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv((33, 65), (4, 2), 16, batch=2))
    kv = torch.stack([k, v], dim=-1)  # k and v become every second number
    Judge([q, kv[..., 0], kv[..., 1]], causal=True).check(on_device)


@triton.jit
def bounds_kernel(out, first, stop, left, right, length, BLOCK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    bounds = flash.tiles_seen(first, stop, left, right, length, BLOCK, LEFT, RIGHT)
    tl.store(out, bounds[0])
    tl.store(out + 1, bounds[1])
    tl.store(out + 2, bounds[2])
    tl.store(out + 3, bounds[3])


@pytest.mark.parametrize("seqlens", [(64, 64), (40, 70), (70, 40)], ids=str)
@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (20, 0), (20, 5), (0, 100)], ids=str)
def test_the_kernel_visits_the_tiles_that_the_picture_shows(seqlens, window_size):
    """`course.widgets.programs` says which tiles a program visits, and which masked; the kernel's loops agree."""
    for program in programs(Visibility(*seqlens, window_size=window_size), 16, 16):
        out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        shift = seqlens[1] - seqlens[0]
        rows = (program.queries.start + shift, program.queries.stop + shift)
        flags = dict(BLOCK=16, LEFT=window_size[0] >= 0, RIGHT=window_size[1] >= 0)
        bounds_kernel[(1,)](out, *rows, *window_size, seqlens[1], **flags)
        begin, whole, whole_stop, end = out.tolist()
        masked = [*range(begin, whole, 16), *range(max(whole, whole_stop), end, 16)]
        assert [keys.start for keys in program.masked] == masked
        assert [keys.start for keys in program.whole] == list(range(whole, whole_stop, 16))


def ragged_qkv(dtype):
    rows = [random_qkv(lengths, (4, 2), 40, dtype, seed=i) for i, lengths in enumerate(LENGTHS)]
    q, k, v = (torch.cat([row[i][0] for row in rows]) for i in range(3))
    bounds = [torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in zip(*LENGTHS, strict=True)]
    return (q, k, v), bounds


def one_by_one(q, k, v, bounds, **options):
    """Each sequence of a ragged batch on its own, by the naive method."""
    outs, lses = [], []
    for (a, b), (c, d) in zip(*(zip(bound, bound[1:], strict=False) for bound in bounds), strict=True):
        out, lse = naive_attention(q[None, a:b], k[None, c:d], v[None, c:d], return_lse=True, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window_size": (30, 0)}], ids=str)
def test_a_ragged_batch_equals_its_sequences_one_by_one_with_gradients(options, dtype):
    qkv, bounds = ragged_qkv(dtype)
    longest = [max(lengths) for lengths in zip(*LENGTHS, strict=True)]
    ragged = Ragged(*(bound.to(DEVICE) for bound in bounds), *longest)
    grad_out = torch.randn_like(qkv[0])

    def results(function, qkv, *arguments):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out, lse = function(*leaves, *arguments, **options)
        return [out, lse, *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    ours = results(on_device_ragged, qkv, ragged)
    naive, reference = (results(one_by_one, x, bounds) for x in (qkv, [x.double() for x in qkv]))
    for i, (a, b, c) in enumerate(zip(ours, naive, reference, strict=True)):
        gradient = {"factor": 3, "scale": max(x.abs().max().item() for x in reference[2:])} if i > 1 else {}
        assert_within_budget(a, b, c, **gradient)


def on_device_ragged(q, k, v, ragged, **options):
    out, lse = flash_attention(*(x.to(DEVICE) for x in (q, k, v)), ragged, **options)
    return out.cpu(), lse.cpu()


def test_nan_behind_the_last_row_is_never_read():
    """Rows and dimensions next to the tensors hold NaN, as in a cache that is not full yet."""
    q, k, v = random_qkv((33, 70), (2, 1), 24, torch.float16)
    room = [torch.full((1, x.shape[1] + 64, x.shape[2], 32), torch.nan, dtype=x.dtype) for x in (q, k, v)]
    for whole, x in zip(room, (q, k, v), strict=True):
        whole[:, : x.shape[1], :, :24] = x
    inside = [whole[:, : x.shape[1], :, :24] for whole, x in zip(room, (q, k, v), strict=True)]
    Judge([q, k, v], causal=True).check(lambda *_, **options: on_device(*inside, **options), grad=False)
    leaves = [x.to(DEVICE).requires_grad_() for x in inside]
    flash_attention(*leaves, causal=True)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_nan_in_one_sequence_of_a_ragged_batch_stays_there():
    (q, k, v), bounds = ragged_qkv(torch.float32)
    rows = slice(bounds[1][3], bounds[1][4])
    k[rows], v[rows] = torch.nan, torch.nan
    longest = [max(lengths) for lengths in zip(*LENGTHS, strict=True)]
    out, _ = on_device_ragged(q, k, v, Ragged(*(bound.to(DEVICE) for bound in bounds), *longest))
    spoilt = out.isnan().any(dim=(1, 2)).nonzero().flatten().tolist()
    assert spoilt == list(range(bounds[0][3], bounds[0][4]))


def test_the_same_call_gives_the_same_bits():
    qkv = [x.to(DEVICE).requires_grad_() for x in random_qkv((65, 130), (4, 1), 32, torch.float16)]

    def run():
        out, lse = flash_attention(*qkv, causal=True)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), qkv)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU kernel has no float64: the backward's formula was not checked")
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradcheck_of_out_and_lse_in_float64(softcap):
    qkv = [x.requires_grad_() for x in random_qkv((5, 7), (4, 2), 3, torch.float64)]
    options = dict(causal=True, window_size=(4, -1), softcap=softcap)
    with tiles(tuning.Config(4, 4, warps=4, stages=1), 3, torch.float64):
        assert torch.autograd.gradcheck(partial(flash_attention, **options), qkv, nondet_tol=0.0, fast_mode=True)


def test_torch_knows_the_operators():
    """opcheck: schema, autograd, and the fake implementation that torch.compile traces with, against the real one."""
    q, k, v = (x.to(DEVICE).requires_grad_() for x in random_qkv((17, 20), (2, 1), 16))
    arguments = (q, k, v, None, None, 17, 20, 0.25, -1, 0, 0.0)
    torch.library.opcheck(torch.ops.kernels.flash_attention_forward, arguments)
    out, lse = torch.ops.kernels.flash_attention_forward(*arguments)
    grads = tuple(x.detach() for x in (out, lse, q, k, v, out, lse))
    torch.library.opcheck(torch.ops.kernels.flash_attention_backward, (*grads, *arguments[3:]))


def test_torch_compile_takes_a_call_in_one_piece():
    q, k, v = (x.to(DEVICE) for x in random_qkv((17, 20), (2, 1), 16))

    def layer(q, k, v):
        return flash_attn_func(q * 2, k, v, causal=True) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))


def test_flash_attns_own_signature_and_its_infinite_lse():
    q, k, v = (x.to(DEVICE) for x in random_qkv((7, 4), (2, 1), 8))
    out, lse, probabilities = flash_attn_func(q, k, v, 0.0, 0.3, True, return_attn_probs=True)
    assert probabilities is None
    assert torch.equal(lse[:, :, :3], torch.full((1, 2, 3), torch.inf, device=DEVICE))  # rows that see nothing
    assert torch.equal(out, flash_attn_func(q, k, v, softmax_scale=0.3, causal=True))
    bounds = (
        torch.tensor([0, 7], dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 4], dtype=torch.int32, device=DEVICE),
    )
    ragged, lse_ragged, _ = flash_attn_varlen_func(
        q[0], k[0], v[0], *bounds, 7, 4, softmax_scale=0.3, causal=True, return_attn_probs=True
    )
    assert torch.equal(ragged, out[0]) and torch.equal(lse_ragged, lse[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p is not supported"),
        ({"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes is not supported"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale is -1.0"),
        ({"window_size": (-2, 0)}, ValueError, "window_size is"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"q": torch.ones(1, 4, 3, 8)}, ValueError, "k has 2 heads, not a divisor of q's 3"),
        ({"q": torch.ones(4, 2, 8)}, ValueError, r"q has shape \(4, 2, 8\), wants \(batch"),
        ({"v": torch.ones(1, 3, 2, 8)}, ValueError, "v has shape"),
        ({"k": torch.ones(1, 4, 2, 8, dtype=torch.half)}, ValueError, "k is torch.float16"),
        ({"q": torch.ones(1, 4, 2, 8).long()}, TypeError, "q is torch.int64"),
        ({name: torch.ones(1, 4, 2, 257) for name in "qkv"}, ValueError, "q has headdim 257, wants 1 to 256"),
    ],
)
def test_what_is_not_supported_is_named(arguments, error, message):
    tensors = {name: torch.ones(1, 4, 2, 8) for name in "qkv"}
    with pytest.raises(error, match=message):
        flash_attn_func(**(tensors | arguments))


BUGS = {
    "a mask aligned at the top left": (r"positions = start \+ seqlen_k - seqlen_q \+ ", "positions = start + ", "out"),
    "no rescale of the accumulator": (r"acc \* rescale\[:, None\]", "acc", "out"),
    "a tail that is not masked": (r"seen & \(columns < seqlen_k\)\[None, :\], scores", "seen, scores", "out"),
    "an lse in base 2": (r" \* LN2\n", "\n", "lse"),
    "no δ in the backward": (r"\(dp - delta_row\[None, :\]\)", "dp", "grad_k"),
    "queries of one head only": (r"for member in range\(GROUP\)", "for member in range(1)", "grad_k"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path):
    """The tests are tested: the kernel's file with one line changed has to fail the check of the grid."""
    pattern, replacement, name = BUGS[bug]
    source, changes = re.subn(pattern, replacement, Path(flash.__file__).read_text())
    assert changes
    library = f"planted{list(BUGS).index(bug)}"
    source = source.replace('"kernels::', f'"{library}::').replace("torch.ops.kernels.", f"torch.ops.{library}.")
    (tmp_path / f"{library}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(library, tmp_path / f"{library}.py")
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    judge = Judge(random_qkv((70, 140), (2, 1), 16), causal=bug != "a tail that is not masked")
    judge.check(on_device)
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        judge.check(partial(on_device, kernel=planted.flash_attention))

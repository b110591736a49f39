"""The Triton kernel against float64: on the GPU where there is one, else in the interpreter, at sizes that fit."""

import importlib
import itertools
import os
import re
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import kernels
from benchmarks.correctness import assert_right, naive_one_by_one, random_ragged
from course.widgets import tiles_by_program
from kernels import tuning
from kernels.flash_attention import Ragged, flash_attention
from kernels.flash_attention.descriptors import using_descriptors
from kernels.runtime import prepare
from kernels.tiles import tiles_seen
from minillm.attention.masks import Visibility
from tests.attention.grid import HEADDIMS, LONG_SEQLENS, SEQLENS, Judge, random_qkv

MODE = prepare()
DEVICE = "cuda" if MODE.name == "gpu" else "cpu"
HEADS = {"mha": (2, 2), "gqa": (4, 2), "mqa": (2, 1)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = [(113, 0), (1, 217), (0, 5), (64, 64), (40, 256)]  # (queries, keys) of a ragged batch's sequences


@pytest.fixture(autouse=True)
def addressing():
    """KERNELS_DESCRIPTORS=1 takes every call whose tensors allow it through descriptors, =0 none."""
    wanted = os.environ.get("KERNELS_DESCRIPTORS")
    with using_descriptors(wanted == "1") if wanted else nullcontext():
        yield


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
        heads = HEADS[self.heads]
        if DEVICE == "cpu" and self.headdim > 128:  # two heads instead of four: the interpreter takes one after another
            heads = (1, 1) if self.heads == "mha" else (2, 1)
        qkv = random_qkv(self.seqlens, heads, self.headdim, self.dtype)
        Judge(qkv, causal=self.causal, window_size=window).check(on_device)


def cases() -> list[Case]:
    """flash-attn's grid: all of it on a GPU; in the interpreter every pair of values of any two factors.

    Lengths and headdims make 66 pairs, and the other factors go round in them. (A pairwise generator fills up what is
    left free with one value: two thirds of its cases would be GQA in a causal window, the most expensive ones.)
    """
    if DEVICE == "cuda":
        whole = [(*SEQLENS, *LONG_SEQLENS), HEADDIMS, HEADS, (False, True), (False, True), DTYPES]
        return [Case(*values) for values in itertools.product(*whole)]
    found, heads = [], list(HEADS)
    for (i, seqlens), (j, headdim) in itertools.product(enumerate(SEQLENS), enumerate(HEADDIMS)):
        flags = ((i // 2 + j) % 2 == 0, (i + j // 2) % 2 == 0)
        found.append(Case(seqlens, headdim, heads[(i + j) % 3], *flags, DTYPES[(i + 2 * j) % 3]))
    return found


def test_the_grid_has_every_pair_and_is_small_enough_for_the_interpreter():
    found = [tuple(vars(case).values()) for case in cases()]
    for one, other in itertools.combinations(range(len(found[0])), 2):
        values = [{case[factor] for case in found} for factor in (one, other)]
        assert {(case[one], case[other]) for case in found} == set(itertools.product(*values))
    assert DEVICE == "cuda" or len(found) == 66


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
    def with_other_strides(q, k, v, **options):
        q, k, v = (x.to(DEVICE) for x in (q, k, v))
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k, v = torch.stack([k, v], dim=-1).unbind(-1)  # every second number
        assert k.stride(-1) == 2 and q.stride(1) < q.stride(2)
        return on_device(q, k, v, **options)

    Judge(random_qkv((33, 65), (4, 2), 16, batch=2), causal=True).check(with_other_strides)


@pytest.mark.skipif(DEVICE == "cuda", reason="memory that is never touched is not free on a GPU: far rows not checked")
def test_a_row_farther_than_two_to_the_31_numbers_is_found():
    q, k, v = random_qkv((17, 20), (1, 1), 16, torch.float16)
    try:
        far = torch.empty(17 * 2**27, dtype=torch.float16).view(1, 17, 2**27)[:, :, None, :16]
    except RuntimeError:
        pytest.skip("no 4.3 GB of address space: far rows were not checked")
    far.copy_(q)
    with tiles(tuning.Config(16, 16, warps=4, stages=1), 16, torch.float16):
        assert torch.equal(flash_attention(far, k, v)[0], flash_attention(q, k, v)[0])


@pytest.mark.parametrize("window_size", [(2**31 - 1, 2**31 - 1), (2**31 - 1, 0), (2**40, -1)], ids=str)
def test_a_window_of_any_size_is_at_most_the_whole_sequence(window_size):
    Judge(random_qkv((20, 37), (1, 1), 16), window_size=window_size).check(on_device)


@triton.jit
def bounds_kernel(out, first, stop, left, right, length, BLOCK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    bounds = tiles_seen(first, stop, left, right, length, BLOCK, LEFT, RIGHT)
    tl.store(out, bounds[0])
    tl.store(out + 1, bounds[1])
    tl.store(out + 2, bounds[2])
    tl.store(out + 3, bounds[3])


@pytest.mark.parametrize("seqlens", [(64, 64), (40, 70), (70, 40)], ids=str)
@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (20, 0), (20, 5), (0, 100)], ids=str)
def test_the_kernel_visits_the_tiles_that_the_picture_shows(seqlens, window_size):
    """`course.widgets.programs` says which tiles a program visits, and which masked; the kernel's loops agree."""
    for program in tiles_by_program(Visibility(*seqlens, window_size=window_size), 16, 16):
        out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        shift = seqlens[1] - seqlens[0]
        rows = (program.queries.start + shift, program.queries.stop + shift)
        flags = dict(BLOCK=16, LEFT=window_size[0] >= 0, RIGHT=window_size[1] >= 0)
        bounds_kernel[(1,)](out, *rows, *window_size, seqlens[1], **flags)
        begin, whole, whole_stop, end = out.tolist()
        masked = [*range(begin, whole, 16), *range(max(whole, whole_stop), end, 16)]
        assert [keys.start for keys in program.masked] == masked
        assert [keys.start for keys in program.whole] == list(range(whole, whole_stop, 16))


def ragged_cases():
    """Each headdim once with the other factors in turns; on a GPU every combination."""
    masks = [{}, {"causal": True}, {"causal": True, "window_size": (30, 0)}, {"window_size": (9, 50)}]
    factors = [HEADDIMS, list(HEADS.values()), masks, DTYPES]
    if DEVICE == "cuda":
        return list(itertools.product(*factors))
    heads = list(HEADS.values())
    return [(headdim, heads[i // 4 % 3], masks[i % 4], DTYPES[i % 3]) for i, headdim in enumerate(HEADDIMS)]


@pytest.mark.parametrize("headdim, heads, mask, dtype", ragged_cases(), ids=str)
def test_a_ragged_batch_equals_its_sequences_one_by_one_with_gradients(headdim, heads, mask, dtype):
    qkv, ragged = random_ragged(LENGTHS, heads, headdim, dtype, DEVICE)
    naive = partial(naive_one_by_one, ragged=ragged)
    assert_right(partial(flash_attention, ragged=ragged), qkv, naive=naive, **mask)


def test_cu_seqlens_may_have_gaps():
    qkv, ragged = random_ragged(LENGTHS, (2, 1), 16, torch.float16, DEVICE)
    spread = (torch.stack([bounds, bounds + 7], dim=1)[:, 0] for bounds in ragged[:2])
    expected = flash_attention(*qkv, ragged)
    assert all(map(torch.equal, flash_attention(*qkv, Ragged(*spread, *ragged[2:])), expected))


def test_nan_behind_the_last_row_is_never_read():
    """Rows and dimensions next to the tensors hold NaN, as in a cache that is not full yet."""
    q, k, v = random_qkv((33, 70), (2, 1), 24, torch.float16)
    inside = []
    for x in (q, k, v):
        room = torch.full((1, x.shape[1] + 64, x.shape[2], 32), torch.nan, dtype=x.dtype, device=DEVICE)
        inside.append(room[:, : x.shape[1], :, :24].copy_(x))  # a part of what was allocated there: the gaps stay
    Judge([q, k, v], causal=True).check(lambda *_, **options: on_device(*inside, **options), grad=False)
    leaves = [x.requires_grad_() for x in inside]
    flash_attention(*leaves, causal=True)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_nan_in_one_sequence_of_a_ragged_batch_stays_there():
    (q, k, v), ragged = random_ragged(LENGTHS, (4, 2), 40, torch.float32, DEVICE)
    bounds = ragged.cu_seqlens_k.tolist()
    k[bounds[3] : bounds[4]], v[bounds[3] : bounds[4]] = torch.nan, torch.nan
    out, _ = flash_attention(q, k, v, ragged)
    spoilt = out.isnan().any(dim=(1, 2)).nonzero().flatten().tolist()
    assert spoilt == list(range(*ragged.cu_seqlens_q.tolist()[3:5]))


def test_the_same_call_gives_the_same_bits():
    qkv = [x.to(DEVICE).requires_grad_() for x in random_qkv((65, 130), (4, 1), 32, torch.float16)]

    def run():
        out, lse = flash_attention(*qkv, causal=True)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), qkv)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU kernel has no float64: the backward's formula was not checked")
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradcheck_of_out_and_lse_in_float64(softcap):
    qkv = [x.requires_grad_() for x in random_qkv((5, 7), (2, 1), 3, torch.float64)]
    options = dict(causal=True, window_size=(4, -1), softcap=softcap)
    with tiles(tuning.Config(4, 4, warps=4, stages=1), 3, torch.float64):
        assert torch.autograd.gradcheck(partial(flash_attention, **options), qkv, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale is -1.0"),
        ({"window_size": (-2, 0)}, ValueError, "window_size is"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"q": torch.ones(1, 4, 3, 8)}, ValueError, "k has 2 heads, not a divisor of q's 3"),
        ({"q": torch.ones(4, 2, 8)}, ValueError, r"q has shape \(4, 2, 8\), wants \(batch"),
        ({"v": torch.ones(1, 3, 2, 8)}, ValueError, "v has shape"),
        ({"k": torch.ones(1, 4, 2, 8, dtype=torch.half)}, ValueError, "k is torch.float16"),
        ({"q": torch.ones(1, 4, 2, 8).long()}, TypeError, "q is torch.int64"),
        ({name: torch.ones(1, 1, 1, 1).expand(65536, 1, 1, 1) for name in "qkv"}, ValueError, "q has batch 65536"),
        ({name: torch.ones(1, 4, 2, 257) for name in "qkv"}, ValueError, "q has headdim 257, wants 1 to 256"),
    ],
)
def test_what_is_not_supported_is_named(arguments, error, message):
    tensors = {name: torch.ones(1, 4, 2, 8) for name in "qkv"}
    with pytest.raises(error, match=message):
        flash_attention(**(tensors | arguments))


KERNELS = Path(kernels.__file__).parent
BUGS = {
    "a mask aligned at the top left": (r"positions = start \+ seqlen_k - seqlen_q \+ ", "positions = start + ", "out"),
    "no rescale of the accumulator": (r"acc \* rescale\[:, None\]", "acc", "out"),
    "a tail that is not masked": (r"seen & \(columns < seqlen_k\)\[None, :\], scores", "seen, scores", "out"),
    "an lse in base 2": (r" \* LN2\n", "\n", "lse"),
    "no δ in the backward": (r"\(dp - delta_row\[None, :\]\)", "dp", "grad_k"),
    "queries of one head only": (r"range\(GROUP \* tiles\)", "range(tiles)", "grad_k"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    """The tests are tested: a copy of the kernel's package with one line changed has to fail the check of the grid."""
    pattern, replacement, name = BUGS[bug]
    library = f"planted{list(BUGS).index(bug)}"
    (tmp_path / library).mkdir()
    changes = 0
    for path in (*KERNELS.glob("flash_attention/*.py"), KERNELS / "tiles.py"):
        source, changed = re.subn(pattern, replacement, path.read_text())
        changes += changed
        source = source.replace('"kernels::', f'"{library}::').replace("torch.ops.kernels.", f"torch.ops.{library}.")
        source = source.replace("kernels.flash_attention", library).replace("kernels.tiles", f"{library}.tiles")
        (tmp_path / library / path.name).write_text(source)
    assert changes
    monkeypatch.syspath_prepend(tmp_path)
    planted = importlib.import_module(library)
    judge = Judge(random_qkv((70, 140), (2, 1), 16), causal=bug != "a tail that is not masked")
    judge.check(on_device)
    with pytest.raises(AssertionError, match=f"^{name}: error"):
        judge.check(partial(on_device, kernel=planted.flash_attention))

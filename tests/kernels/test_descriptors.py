"""Tensor descriptors in place of pointers: the same bits, and a reason where a call takes pointers."""

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch

from benchmarks.correctness import random_ragged
from kernels import tuning
from kernels.descriptors import Checked
from kernels.flash_attention import flash_attention
from kernels.flash_attention.descriptors import (
    _descriptor,
    candidates_here,
    describe,
    using_descriptors,
    why_not_on,
    why_pointers,
)
from kernels.runtime import prepare
from tests.attention.grid import HEADDIMS, random_qkv

MODE = prepare()
DEVICE = "cuda" if MODE.name == "gpu" else "cpu"
MASKS = [{}, {"causal": True}, {"window_size": (30, 0)}, {"window_size": (9, 50), "softcap": 3.0}]
DTYPES = [torch.float16, torch.float32]
HEADS = [(2, 2), (4, 2), (2, 1)]
LENGTHS = [(40, 0), (1, 70), (0, 5), (33, 64), (20, 90)]  # (queries, keys) of a ragged batch's sequences


def aligned_cases():
    """Every headdim whose rows begin at multiples of 16 bytes, with the other factors in turns."""
    for i, headdim in enumerate(width for width in (8, *HEADDIMS) if width % 8 == 0):
        for j, layout in enumerate(("padded", "ragged", "gaps")):
            yield (
                headdim,
                layout,
                HEADS[(i + j) % 3],
                MASKS[(i + 2 * j) % 4],
                (torch.float16, torch.float32)[(i + j) % 2],
            )


@pytest.mark.parametrize("headdim, layout, heads, mask, dtype", list(aligned_cases()), ids=str)
def test_descriptors_give_the_bits_of_pointers(headdim, layout, heads, mask, dtype):
    """In tiles that the lengths do not fill. `KERNELS_DESCRIPTORS=1` takes all of test_flash_attention through them."""
    if layout == "ragged":
        (q, k, v), ragged = random_ragged(LENGTHS, heads, headdim, dtype, DEVICE)
    else:
        q, k, v = (x.to(DEVICE) for x in random_qkv((45, 75), heads, headdim, dtype, batch=2))
        ragged = None
    if layout == "gaps":
        q, k, v = (among_nan(x) for x in (q, k, v))
    config = tuning.Config(32, 32, warps=4, stages=2) if DEVICE == "cpu" else None
    with ExitStack() as stack:
        if config:
            stack.enter_context(tuning.using("forward", headdim, dtype, config))
        with using_descriptors(False):
            expected = flash_attention(q, k, v, ragged, **mask)
        with using_descriptors():
            assert not why_pointers(q, k, v)
            results = flash_attention(q, k, v, ragged, **mask)
    if DEVICE == "cpu":
        assert all(map(torch.equal, results, expected))
    else:  # other tiles: another order of the sums
        torch.testing.assert_close(results, expected)


def among_nan(x):
    """A view with NaN behind the last row and behind each row's last dimension."""
    batch, rows, heads, headdim = x.shape
    room = torch.full((batch, rows + 40, heads, headdim + 8), torch.nan, dtype=x.dtype, device=x.device)
    return room[:, :rows, :, :headdim].copy_(x)


def test_the_next_sequence_of_a_ragged_batch_is_not_seen_even_where_it_holds_nan():
    (q, k, v), ragged = random_ragged([(20, 40), (20, 40)], (2, 1), 16, torch.float16, DEVICE)
    with using_descriptors():
        clean, _ = flash_attention(q, k, v, ragged)
        k[40:], v[40:] = torch.nan, torch.nan
        out, _ = flash_attention(q, k, v, ragged)
    assert torch.equal(out[:20], clean[:20]) and out[20:].isnan().all()


def half(*shape):
    return torch.zeros(*shape, dtype=torch.float16)


WHOLE = half(1, 20, 4, 64)
REASONS = {
    "an odd headdim": (half(1, 20, 4, 59), "has a stride of 472 bytes, and a descriptor takes multiples of 16"),
    "an address": (half(20 * 4 * 64 + 8)[1:5121].view(1, 20, 4, 64), "begins at an address that 16 does not divide"),
    "a head that is expanded": (half(1, 20, 1, 64).expand(1, 20, 4, 64), "has a stride of 0 bytes"),
    "no rows": (half(1, 0, 4, 64), "has a dimension of 0"),
    "an odd stride": (half(1, 20, 4 * 65)[..., :256].unflatten(2, (4, 64)), "has a stride of 520 bytes"),
}


@pytest.mark.parametrize("what", REASONS)
def test_what_a_descriptor_cannot_do_takes_pointers_and_says_why(what):
    tensor, reason = REASONS[what]
    with using_descriptors():
        assert why_pointers(WHOLE, WHOLE, WHOLE) == ""
        for i, name in enumerate("qkv"):
            tensors = [WHOLE, WHOLE, WHOLE]
            tensors[i] = tensor
            assert why_pointers(*tensors).startswith(f"{name} {reason}")
    with using_descriptors(False):
        assert why_pointers(WHOLE, WHOLE, WHOLE) == "descriptors are switched off"


def test_the_stride_of_a_dimension_of_one_does_not_matter():
    odd = half(7 + 64)[7:].as_strided((1, 1, 1, 64), (3, 5, 7, 1), 0)
    with using_descriptors():
        assert why_pointers(odd, odd, odd) == ""
    assert describe(odd, 16, 64).strides == [8, 8, 8, 1]


def test_descriptors_are_for_half_precision_from_sm_90_on():
    half_precision = (torch.float16, torch.bfloat16)
    for target in ("sm_90", "sm_100"):
        assert not any(why_not_on(target, dtype, headdim) for dtype in half_precision for headdim in (16, 96, 128, 256))
        assert "without tensor cores" in why_not_on(target, torch.float32, 128)
    assert not why_not_on("sm_120", torch.bfloat16, 128)
    assert "no tile for headdim 256" in why_not_on("sm_120", torch.bfloat16, 256)
    for target in ("sm_80", "sm_86", "sm_89"):
        assert "no tensor memory accelerator" in why_not_on(target, torch.bfloat16, 128)


def test_what_is_timed_on_a_gpu_are_the_tiles_of_a_call_there(monkeypatch):
    monkeypatch.setattr(tuning, "this_gpu", lambda: "sm_90")
    with using_descriptors():
        assert candidates_here("forward", 128, torch.bfloat16) == tuning.TMA_CONFIGS["wgmma"][128]
        assert candidates_here("backward_q", 128, torch.bfloat16) == tuning.CONFIGS["wgmma"]["backward_q"][128]
    with using_descriptors(False):
        assert candidates_here("forward", 128, torch.bfloat16) == tuning.CONFIGS["wgmma"]["forward"][128]


def test_a_descriptor_has_its_own_tensor_and_nothing_keeps_it():
    one, other = half(1, 20, 4, 64), half(1, 20, 4, 64)
    first, second = describe(one, 32, 64), describe(other, 32, 64)
    assert first.base is one and second.base is other and first.shape == second.shape == [1, 4, 20, 64]
    gone = weakref.ref(one)
    del one, first
    gc.collect()
    assert gone() is None


def test_another_shape_stride_type_or_block_is_another_descriptor_and_the_store_is_bounded():
    checked = Checked(lambda x, rows: _descriptor(x, rows, 64), most=3)
    spread = half(1, 20, 8, 64)[:, :, ::2]  # the shape of WHOLE
    for x, rows in ((WHOLE, 32), (spread, 32), (WHOLE, 16), (WHOLE[:, :10], 32), (WHOLE.float(), 32), (WHOLE, 32)):
        found = checked(x, rows)
        assert found.base is x and vars(found) == vars(_descriptor(x, rows, 64)) | {"base": x}
        assert len(checked.fields) <= 3

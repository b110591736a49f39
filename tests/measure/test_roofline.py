"""The roofline's arithmetic: the ridge, the time at best, and the FLOPs of an attention."""

import pytest
import torch

from minillm.measure import GPUS, attainable, attention_flops, ridge, time_bound

EACH_GPU = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)


def visible(seqlen_q, seqlen_k):
    """Pairs under a bottom-right causal mask, by making the mask."""
    return int(torch.ones(seqlen_q, seqlen_k).tril(seqlen_k - seqlen_q).sum())


def test_ridge_of_an_h100_is_295_flops_a_byte_and_of_an_h200_206():
    assert ridge(GPUS["H100"]) == pytest.approx(295.2, abs=0.05)
    assert ridge(GPUS["H200"]) == pytest.approx(206.0, abs=0.05)
    assert ridge(GPUS["H100"], "fp8") == pytest.approx(590.7, abs=0.05)


@EACH_GPU
def test_at_the_ridge_both_limits_meet(gpu):
    at_ridge = ridge(gpu)
    assert attainable(gpu, at_ridge) == pytest.approx(gpu.half_flops)
    assert attainable(gpu, at_ridge / 2) == pytest.approx(gpu.half_flops / 2)
    assert attainable(gpu, at_ridge * 2) == gpu.half_flops
    assert time_bound(gpu, flops=1e12, nbytes=1e12 / at_ridge) == pytest.approx(1e12 / gpu.half_flops)


def test_time_is_bound_by_the_slower_of_the_two():
    h100 = GPUS["H100"]
    assert time_bound(h100, flops=989e12, nbytes=0) == 1.0
    assert time_bound(h100, flops=0, nbytes=3.35e12) == 1.0
    assert time_bound(h100, flops=989e12, nbytes=6.7e12) == 2.0
    assert time_bound(h100, flops=1979e12, nbytes=0, dtype="fp8") == 1.0


def test_reading_more_bytes_never_takes_less_time():
    times = [time_bound(GPUS["L4"], 1e12, nbytes) for nbytes in (0, 1e9, 1e10, 1e11, 1e12)]
    assert times == sorted(times)


def test_flops_of_a_published_benchmark():
    # Hidden size 2048, 16k tokens, head dimension 128: the points of the FlashAttention-3 paper's charts.
    full = attention_flops(1, 16, 16384, 16384, 128)
    assert full == 4 * 16 * 16384**2 * 128
    assert attention_flops(1, 16, 16384, 16384, 128, causal=True, count="published") * 2 == full


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (7, 7), (1, 9), (5, 9), (9, 5), (9, 1), (0, 4), (4, 0)])
def test_causal_flops_count_the_pairs_of_the_mask(seqlen_q, seqlen_k):
    counted = attention_flops(2, 3, seqlen_q, seqlen_k, 64, causal=True)
    assert counted == 4 * 2 * 3 * 64 * visible(seqlen_q, seqlen_k)


def test_one_query_in_a_decode_step_sees_every_key():
    assert attention_flops(1, 8, 1, 4096, 128, causal=True) == attention_flops(1, 8, 1, 4096, 128)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(512, 512), (300, 900), (900, 300)])
def test_published_causal_flops_are_flash_attns_formula(seqlen_q, seqlen_k):
    average = (max(0, seqlen_k - seqlen_q) + seqlen_k) / 2
    published = attention_flops(2, 3, seqlen_q, seqlen_k, 64, causal=True, count="published")
    assert published == 2 * 3 * 2 * seqlen_q * average * (64 + 64)


def test_published_and_exact_differ_by_the_diagonal():
    exact = attention_flops(1, 1, 1000, 1000, 1, causal=True)
    published = attention_flops(1, 1, 1000, 1000, 1, causal=True, count="published")
    assert exact - published == 4 * 1000 / 2


def test_without_a_mask_both_counts_agree():
    assert attention_flops(1, 2, 30, 50, 64, count="published") == attention_flops(1, 2, 30, 50, 64)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="seqlen_q is -1"):
        attention_flops(1, 1, -1, 4, 64)
    with pytest.raises(ValueError, match="count is 'half'"):
        attention_flops(1, 1, 4, 4, 64, count="half")
    with pytest.raises(ValueError, match="intensity is -2"):
        attainable(GPUS["T4"], -2)
    with pytest.raises(ValueError, match="nbytes is nan"):
        time_bound(GPUS["T4"], 1.0, float("nan"))


def test_a_rate_that_the_gpu_lacks_is_refused_and_what_it_has_is_said():
    with pytest.raises(ValueError, match="dtype is 'fp8'; the A100 SXM 80GB's Tensor Cores have fp16, bf16"):
        ridge(GPUS["A100"], "fp8")
    with pytest.raises(ValueError, match="dtype is 'bf16'; the T4's Tensor Cores have fp16"):
        GPUS["T4"].flops("bf16")
    assert GPUS["H100"].flops("fp16") == GPUS["H100"].flops("bf16") == GPUS["H100"].flops()

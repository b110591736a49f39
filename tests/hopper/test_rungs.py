"""Every rung is within the error budget in the emulator, and free of reports in any order."""

import time

import pytest
import torch

from kernels.hopper.launch import RUNGS, attention, launch_of
from minillm.attention import naive_attention
from minillm.measure import assert_within_budget
from tests.attention.grid import random_qkv

SIZES = [  # (seqlen_q, seqlen_k), (nheads, nheads_k), headdim
    ((1, 1), (1, 1), 64),
    ((1, 300), (4, 1), 128),
    ((113, 203), (4, 2), 64),
    ((128, 217), (2, 1), 128),
    ((203, 113), (2, 2), 64),  # causal: the first 90 rows see no key
    ((257, 257), (2, 1), 64),
]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def naive(q, k, v, **options):
    return naive_attention(q, k, v, return_lse=True, **options)


def check(qkv, rung, *, multiple=4, kernel_options=None, **options):
    ours = attention(*qkv, rung=rung, **(kernel_options or {}), **options)
    same, exact = naive(*qkv, **options), naive(*(x.double() for x in qkv), **options)
    for result, baseline, reference in zip(ours, same, exact, strict=True):
        assert_within_budget(result, baseline, reference, multiple=multiple)
    assert ours[0].dtype == qkv[0].dtype and ours[1].dtype == torch.float32


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlens, heads, headdim", SIZES, ids=str)
def test_a_rung_is_within_the_budget(rung, dtype, causal, seqlens, heads, headdim):
    check(random_qkv(seqlens, heads, headdim, dtype, batch=2), rung, causal=causal)


@pytest.mark.skipif(not HOPPER, reason="no Hopper GPU: what the rungs give on one was not verified")
@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_is_within_the_budget_on_a_hopper_gpu(rung):
    for seqlens, heads, headdim in SIZES:
        for causal in (False, True):
            qkv = random_qkv(seqlens, heads, headdim, torch.bfloat16, batch=2)
            check([x.cuda() for x in qkv], rung, causal=causal)


@pytest.mark.parametrize("rung", RUNGS)
def test_logits_thirty_times_as_large_and_a_scale_are_within_the_budget(rung):
    qkv = random_qkv((64, 217), (2, 1), 64, torch.bfloat16, magnitude=30)
    check(qkv, rung, multiple=8, causal=True, softmax_scale=0.3)


@pytest.mark.parametrize("rung", RUNGS)
def test_other_tiles_give_the_same_attention(rung):
    qkv = random_qkv((150, 150), (1, 1), 64, torch.float16)
    for block_m, block_n in ((64, 32), (64, 128), (128, 64)):
        check(qkv, rung, causal=True, kernel_options={"block_m": block_m, "block_n": block_n})


@pytest.mark.parametrize("rung", RUNGS)
def test_a_sequence_does_not_see_its_neighbours(rung):
    """Rows past the end are zeros, and not the next sequence's, which may hold anything."""
    q, k, v = random_qkv((100, 100), (1, 1), 64, torch.bfloat16, batch=2)
    alone, alone_lse = attention(q[:1], k[:1], v[:1], rung=rung)
    k[1], v[1] = torch.nan, torch.nan
    out, lse = attention(q, k, v, rung=rung)
    assert torch.equal(out[:1], alone) and torch.equal(lse[:1], alone_lse)


@pytest.mark.parametrize("rung", RUNGS)
def test_tensors_that_are_not_contiguous_are_taken_as_they_are(rung):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv((70, 90), (2, 1), 64, torch.float16))
    check([q, k, v], rung, causal=True)


@pytest.mark.parametrize("rung", RUNGS)
def test_two_hundred_orders_bring_no_report_and_one_result(rung):
    """128 queries, five tiles of keys in two slots. The emulator holds each order's result to the plain one's."""
    q, k, v = random_qkv((128, 160), (1, 1), 64, torch.bfloat16)
    start = time.perf_counter()
    explored = attention(q, k, v, rung=rung, causal=True, block_m=64, block_n=32, explore=200)
    assert time.perf_counter() - start < 60
    plain = attention(q, k, v, rung=rung, causal=True, block_m=64, block_n=32)
    assert all(torch.equal(one, other) for one, other in zip(explored, plain, strict=True))


@pytest.mark.parametrize("rung", RUNGS)
def test_one_sequence_expanded_to_a_batch_is_laid_out_for_the_copy_engine(rung):
    """The engine steps from sequence to sequence by a stride, which 0 is not."""
    q, k, v = (x.expand(2, -1, -1, -1) for x in random_qkv((70, 90), (2, 1), 64, torch.float16))
    check([q, k, v], rung)
    described = launch_of(q, k, v, q.clone(), torch.empty(2, 2, 70), causal=False).arguments[:3]
    assert all(stride > 0 for descriptor in described for stride in descriptor.strides)


def test_a_head_of_512_takes_less_than_ten_seconds():
    q, k, v = random_qkv((512, 512), (1, 1), 64, torch.bfloat16)
    start = time.perf_counter()
    attention(q, k, v)
    assert time.perf_counter() - start < 10


def test_no_query_and_no_key_need_no_launch():
    q, k, v = random_qkv((3, 5), (1, 1), 64, torch.float16)
    out, lse = attention(q, k[:, :0], v[:, :0])
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert attention(q[:, :0], k, v)[0].shape == (1, 0, 1, 64)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda q, k, v: (q, k, v), {"rung": "x"}, "rung is 'x', wants one of tma_wgmma, pipelined, specialized"),
        (lambda q, k, v: (q.float(), k, v), {}, "q is torch.float32 on cpu, wants bf16 or fp16"),
        (lambda q, k, v: (q[..., :32], k, v), {}, r"q has shape \(1, 3, 2, 32\), wants"),
        (lambda q, k, v: (q, k, v[:, :2]), {}, "do not fit each other"),
        (lambda q, k, v: (q[:, :, :1], k, v), {}, "key has 2 heads, not a divisor of query's 1"),
        (lambda q, k, v: (q, k, v), {"softmax_scale": -1.0}, "softmax_scale is -1.0, wants a positive number"),
        (lambda q, k, v: (q, k, v), {"softmax_scale": float("nan")}, "softmax_scale is nan, wants a positive number"),
        (lambda q, k, v: (q, k, v), {"block_m": 32}, "block_m is 32, wants 64 or 128"),
        (lambda q, k, v: (q, k, v), {"block_n": 8}, "block_n is 8, wants a power of two from 16 to 256"),
        (lambda *qkv: [torch.cat((x, x), 3) for x in qkv], {"block_n": 256}, "block_n is 256, wants .* from 16 to 128"),
        (lambda q, k, v: (q, k, v), {"block_n": 100}, "block_n is 100, wants a power of two from 16 to 256"),
        (lambda *qkv: [x.expand(65536, -1, -1, -1) for x in qkv], {}, "q has batch 65536 and 2 heads"),
    ],
)
def test_bad_input_is_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*random_qkv((3, 3), (2, 2), 64, torch.float16)), **options)

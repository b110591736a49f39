"""Inputs that catch: lengths 0 and 1, rows that see nothing, strides, ragged batches, and bad arguments."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels.runtime import prepare
from minillm.attention import (
    attention,
    attention_varlen,
    backends,
    choose_backend,
    flash_attention,
    naive_attention,
    online_softmax_attention,
)
from minillm.attention.keys import as_ragged
from minillm.measure import assert_within_budget
from tests.attention.grid import Judge, random_qkv

WITH_LSE = [naive_attention, online_softmax_attention, flash_attention]
INTERPRETED = ["triton"] if prepare().name == "interpreter" else []  # on a GPU: tests/kernels
BACKENDS = ["naive", "tiled", "sdpa", *INTERPRETED]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlens", [(1, 1), (1, 9), (9, 1), (0, 5), (5, 0), (0, 0), (1, 339)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_and_one_row_inputs(seqlens, causal, dtype):
    judge = Judge(random_qkv(seqlens, (4, 2), 16, dtype, batch=2), causal=causal)
    for function in WITH_LSE:
        judge.check(function)
    judge.check(partial(attention, backend="sdpa"), lse=False)


def test_an_empty_batch_gives_an_empty_result():
    q, k, v = random_qkv((3, 5), (4, 2), 8, batch=0)
    for backend in BACKENDS:
        assert attention(q, k, v, backend=backend).shape == (0, 3, 4, 8)


@pytest.mark.parametrize("function", WITH_LSE)
def test_rows_that_see_nothing_have_out_0_lse_minus_infinity_and_finite_gradients(function):
    qkv = [x.requires_grad_() for x in random_qkv((7, 4), (2, 1), 8)]
    out, lse = function(*qkv, causal=True, return_lse=True)  # queries 0 to 2 stand left of key 0
    assert torch.equal(out[:, :3], torch.zeros(1, 3, 2, 8))
    assert torch.equal(lse[:, :, :3], torch.full((1, 2, 3), -torch.inf))
    assert lse[:, :, 3:].isfinite().all()
    (out.sum() + lse[:, :, 3:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in qkv)
    assert torch.equal(qkv[0].grad[:, :3], torch.zeros(1, 3, 2, 8))


def test_sdpa_gives_0_and_finite_gradients_where_a_row_sees_nothing():
    qkv = [x.requires_grad_() for x in random_qkv((7, 4), (2, 1), 8)]
    out = attention(*qkv, causal=True, backend="sdpa")
    out.sum().backward()
    assert torch.equal(out[:, :3], torch.zeros(1, 3, 2, 8))
    assert all(x.grad.isfinite().all() for x in qkv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_of_a_causal_call_sees_all_keys(backend):
    """Bottom-right alignment: the last query stands at the last key. Aligned top-left, it would see one key only."""
    q, k, v = random_qkv((1, 9), (4, 2), 16)
    torch.testing.assert_close(attention(q, k, v, causal=True, backend=backend), attention(q, k, v, backend="naive"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_head_reads_its_own_group(backend):
    """Query heads 0 and 1 read KV head 0, heads 2 and 3 read KV head 1: grouped, not interleaved."""
    q, k, v = random_qkv((5, 6), (4, 2), 8)
    out = attention(q, k, v, backend=backend)
    for head in range(4):
        kv = slice(head // 2, head // 2 + 1)
        alone = attention(q[:, :, head : head + 1], k[:, :, kv], v[:, :, kv], backend="naive")
        torch.testing.assert_close(out[:, :, head : head + 1], alone)


@pytest.mark.parametrize("magnitude", [60, 2000])  # q · k beyond 65504; and so times the scale
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_survives_scores_that_it_cannot_hold(backend, magnitude):
    q, k, v = random_qkv((9, 9), (2, 2), 128, torch.float16)
    q, k = q * magnitude, k * 60
    out = attention(q, k, v, causal=True, backend=backend)
    reference = naive_attention(q.double(), k.double(), v.double(), causal=True)
    single = naive_attention(q.float(), k.float(), v.float(), causal=True).half()  # the error of the result's dtype
    assert_within_budget(out, single, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_computes_in_qs_dtype_under_autocast(backend):
    qkv = [x.requires_grad_() for x in random_qkv((33, 40), (4, 2), 16)]

    def results():
        out = attention(*qkv, causal=True, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        inside = results()
    assert all(x.dtype == torch.float32 for x in inside)
    assert torch.equal(inside[0], outside[0])
    if backend == "tiled":  # the others' backward is autograd's own, which autocast reaches
        assert all(map(torch.equal, inside, outside))


COMPILED = [("auto", {"causal": True, "softcap": 5.0}), ("naive", {"causal": True}), ("sdpa", {"window_size": (5, 2)})]


@pytest.mark.parametrize("backend, options", [*COMPILED, *((name, {"causal": True}) for name in INTERPRETED)], ids=str)
def test_a_compiled_call_gives_the_eager_result_at_every_length(backend, options):
    torch._dynamo.reset()
    call = partial(attention, backend=backend, **options)
    compiled = torch.compile(lambda q, k: call(q, k, k).square(), backend="eager")
    for seqlens in ((24, 24), (20, 20), (9, 30)):
        q, k, _ = (x.requires_grad_() for x in random_qkv(seqlens, (2, 2), 16))
        ours, eager = compiled(q, k), call(q, k, k).square()
        assert torch.equal(ours, eager)
        assert torch.equal(*(torch.autograd.grad(out.sum(), q)[0] for out in (ours, eager)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_hides_as_a_scale_is_refused(backend):
    q, k, v = random_qkv((4, 4), (2, 2), 8)
    with pytest.raises(TypeError, match="softmax_scale is a Tensor, wants a number"):
        attention(q, k, v, backend=backend, softmax_scale=torch.tensor(0.5, requires_grad=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_not_contiguous(backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv((33, 65), (4, 2), 16))
    wide = torch.stack([k, v], dim=-1)  # k and v become every second number
    out = attention(q, wide[..., 0], wide[..., 1], causal=True, backend=backend)
    torch.testing.assert_close(out, attention(q, k, v, causal=True, backend="naive"))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradcheck_of_out_and_lse_in_float64(softcap):
    qkv = [x.requires_grad_() for x in random_qkv((5, 7), (4, 2), 3, torch.float64)]
    options = dict(causal=True, window_size=(4, -1), softcap=softcap, block_q=2, block_k=3, return_lse=True)
    assert torch.autograd.gradcheck(partial(flash_attention, **options), qkv)


@pytest.mark.parametrize("function", [online_softmax_attention, naive_attention])
def test_gradcheck_of_what_autograd_differentiates(function):
    qkv = [x.requires_grad_() for x in random_qkv((5, 7), (4, 2), 3, torch.float64)]
    assert torch.autograd.gradcheck(partial(function, causal=True, return_lse=True), qkv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ragged_batch_equals_its_sequences_one_by_one(backend):
    lengths_q, lengths_k = [3, 0, 1, 40], [5, 7, 0, 133]
    rows = [random_qkv(pair, (4, 2), 16, seed=i) for i, pair in enumerate(zip(lengths_q, lengths_k, strict=True))]
    q, k, v = (torch.cat([row[i][0] for row in rows]) for i in range(3))
    cu_seqlens = [torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    out = attention_varlen(q, k, v, *cu_seqlens, causal=True, backend=backend)
    for row, start in zip(rows, cu_seqlens[0].tolist(), strict=False):
        naive = naive_attention(*row, causal=True)
        reference = naive_attention(*(x.double() for x in row), causal=True)
        assert_within_budget(out[None, start : start + naive.shape[1]], naive, reference)


def test_a_ragged_batch_returns_its_lse_as_heads_by_rows():
    q, k, v = (x[0] for x in random_qkv((6, 6), (4, 2), 8))
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    out, lse = attention_varlen(q, k, v, bounds, bounds, return_lse=True)
    expected = naive_attention(q[None, 2:], k[None, 2:], v[None, 2:], return_lse=True)[1][0]
    assert (out.shape, lse.shape) == ((6, 4, 8), (4, 6))
    torch.testing.assert_close(lse[:, 2:], expected)


def test_on_a_gpu_a_ragged_batch_is_one_launch_of_the_triton_kernel(monkeypatch):
    """SDPA comes first for a padded batch, but has one launch for each sequence of a ragged one."""
    launches = []
    there = replace(
        backends.BACKENDS["triton"],
        why_not=lambda q, keys, options: None,
        slow=lambda q, keys, options: None,
        run=lambda q, keys, options: launches.append(as_ragged(q, keys, options)[-1][2:]),
    )
    monkeypatch.setitem(backends.BACKENDS, "triton", there)
    q, k, v = (x[0] for x in random_qkv((6, 7), (4, 2), 8))
    bounds_q, bounds_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 2, 6], [0, 7, 7]))
    attention_varlen(q, k, v, bounds_q, bounds_k, causal=True)
    assert launches == [(4, 7)]  # the longest sequences
    assert choose_backend(q[None], k[None], v[None]).name == "sdpa"


def test_which_back_end_runs_and_why_can_be_asked():
    q, k, v = random_qkv((2, 2), (2, 2), 8)
    assert choose_backend(q, k, v).name == "sdpa"
    assert choose_backend(q, k, v, backend="naive").reason == "asked for by name"
    choice = choose_backend(q, k, v, return_lse=True)
    assert (choice.name, choice.passed_over["sdpa"]) == ("tiled", "does not return the lse")
    assert choice.passed_over["triton"].startswith("would run in the interpreter, slowly")
    assert choose_backend(q, k, v, softcap=5.0).name == "tiled"
    assert choose_backend(q, k, v, block_q=64).name == "tiled"


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"return_lse": True}, {"block_k": 16}])
def test_what_sdpa_cannot_do_is_an_error_by_name_and_another_choice_under_auto(options):
    q, k, v = random_qkv((4, 4), (2, 2), 8)
    with pytest.raises(ValueError, match="'sdpa' (has no|does not)"):
        attention(q, k, v, backend="sdpa", **options)
    attention(q, k, v, **options)


def change(name, to):
    return lambda q, k, v: {**{"q": q, "k": k, "v": v}, name: to({"q": q, "k": k, "v": v}[name])}


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (change("q", lambda q: q[0]), ValueError, r"q has shape \(4, 8, 16\), wants"),
        (change("q", lambda q: q[:, :, :7]), ValueError, "k has 2 heads, not a divisor of q's 7"),
        (change("k", lambda k: k.half()), TypeError, "k is torch.float16, q is torch.float32"),
        (change("v", lambda v: v.long()), TypeError, "v is torch.int64"),
        (change("k", lambda k: k[..., :8]), ValueError, "k has headdim 8, q has 16"),
        (change("v", lambda v: v[:, :3]), ValueError, "v has shape"),
        (change("k", lambda k: k.repeat(2, 1, 1, 1)), ValueError, "k has batch 2, q has 1"),
        (lambda q, k, v: dict(q=q, k=k, v=v, window_size=(-2, 0)), ValueError, "window_size is"),
        (lambda q, k, v: dict(q=q, k=k, v=v, softcap=-1.0), ValueError, "softcap is -1.0"),
        (lambda q, k, v: dict(q=q, k=k, v=v, backend="flash"), ValueError, "backend is 'flash', wants one of"),
        (lambda q, k, v: dict(q=q, k=k, v=v, block_q=0), ValueError, "block_q is 0"),
    ],
)
def test_bad_input_names_the_argument_what_it_got_and_what_it_wants(spoil, error, message):
    arguments = spoil(*random_qkv((4, 5), (8, 2), 16))
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    "bounds, message",
    [
        (torch.tensor([0, 2, 6]), "wants int32"),
        (torch.tensor([0, 2, 5], dtype=torch.int32), "to the 6 rows of q"),
        (torch.tensor([0, 4, 2, 6], dtype=torch.int32), "wants to rise"),
    ],
)
def test_bad_cu_seqlens_are_named(bounds, message):
    q, k, v = (x[0] for x in random_qkv((6, 6), (2, 2), 8))
    good = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"cu_seqlens_q.*{message}"):
        attention_varlen(q, k, v, bounds, good)
    with pytest.raises(ValueError, match="they must agree"):
        attention_varlen(q, k, v, good, torch.tensor([0, 6], dtype=torch.int32))

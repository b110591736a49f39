"""flash-attn's signatures: what they return, what they refuse, and that a back end can be asked for by name."""

import inspect
from functools import partial

import pytest
import torch

from kernels.runtime import prepare
from minillm.attention import Keys, attention, attention_varlen, inputs
from minillm.attention.keys import Options
from minillm.interfaces.flash_attn import flash_attn_func, flash_attn_varlen_func
from tests.attention.grid import Judge, random_qkv

MODE = prepare()
DEVICE = "cuda" if MODE.name == "gpu" else "cpu"
BACKENDS = ["naive", "tiled", "auto"] if MODE.name == "none" else ["triton", "naive", "tiled", "auto"]


def bounds(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flash_attns_own_signature_and_its_infinite_lse(backend):
    q, k, v = (x.to(DEVICE) for x in random_qkv((7, 4), (2, 1), 8))
    out, lse, probabilities = flash_attn_func(q, k, v, 0.0, 0.3, True, return_attn_probs=True, backend=backend)
    assert probabilities is None
    assert torch.equal(lse[:, :, :3], torch.full((1, 2, 3), torch.inf, device=DEVICE))  # rows that see nothing
    assert torch.equal(out, flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, backend=backend))
    ragged, lse_ragged, _ = flash_attn_varlen_func(
        *(q[0], k[0], v[0], bounds(7), bounds(4), 7, 4),
        softmax_scale=0.3, causal=True, return_attn_probs=True, backend=backend,
    )  # fmt: skip
    assert torch.equal(ragged, out[0]) and torch.equal(lse_ragged, lse[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_and_gradients_are_within_the_budget(backend):
    def called(q, k, v, return_lse=True, **options):
        q, k, v = (x.to(DEVICE) for x in (q, k, v))
        out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True, backend=backend)
        return out.cpu(), lse.cpu()

    Judge(random_qkv((40, 70), (4, 2), 16), causal=True, window_size=(30, -1), softcap=5.0).check(called)


def test_the_arguments_are_flash_attns_and_a_backend_behind_them():
    padded = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    ragged = padded.replace("q k v", "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k") + " block_table"
    for function, names in ((flash_attn_func, padded), (flash_attn_varlen_func, ragged)):
        *theirs, ours = inspect.signature(function).parameters.values()
        assert [parameter.name for parameter in theirs] == names.split()
        assert ours.name == "backend" and ours.kind is ours.KEYWORD_ONLY


@pytest.mark.skipif(MODE.name == "none", reason="no Triton: a compiled call of its kernel was not tried")
def test_torch_compile_takes_a_call_in_one_piece_with_its_gradients():
    def layer(q, k, v):
        return flash_attn_func(2 * q, k, v, causal=True, backend="triton") + 1

    q, k, v = (x.to(DEVICE).requires_grad_() for x in random_qkv((17, 20), (2, 1), 16))

    def results(layer):
        out = layer(q, k, v)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    torch.testing.assert_close(results(torch.compile(layer, fullgraph=True, backend="aot_eager")), results(layer))


def test_a_deterministic_call_gives_the_same_bits():
    q, k, v = (x.to(DEVICE).requires_grad_() for x in random_qkv((33, 65), (4, 1), 16))

    def results():
        out = flash_attn_func(q, k, v, causal=True, deterministic=True)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    assert all(map(torch.equal, results(), results()))


def test_the_fused_kernel_that_returns_no_lse_is_refused():
    q, k, v = (x.to(DEVICE) for x in random_qkv((4, 4), (1, 1), 8))
    with pytest.raises(ValueError, match="backend 'sdpa' does not return the lse"):
        flash_attn_func(q, k, v, backend="sdpa")
    assert torch.equal(flash_attn_func(q, k, v), attention(q, k, v, return_lse=True)[0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dropout_p": 0.1}, "dropout_p is not supported"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes is not supported"),
    ],
)
def test_what_is_not_supported_is_named(arguments, message):
    tensors = {name: torch.ones(1, 4, 2, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        flash_attn_func(**(tensors | arguments))
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(*(x[0] for x in tensors.values()), bounds(4), bounds(4), 4, 4, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "block_table is not supported"),
        ({"max_seqlen_q": 2}, "max_seqlen_q is 2, and a sequence has 3 rows"),
        ({"max_seqlen_k": 0}, "max_seqlen_k is 0, and a sequence has 3 rows"),
    ],
)
def test_a_ragged_call_names_pages_and_lengths_that_are_too_small(arguments, message):
    q, k, v = torch.ones(3, 4, 2, 8, device=DEVICE)
    lengths = {"max_seqlen_q": 3, "max_seqlen_k": 9}
    flash_attn_varlen_func(q, k, v, bounds(1, 4), bounds(1, 4), **lengths)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, k, v, bounds(1, 4), bounds(1, 4), **(lengths | arguments))


WRONG_BOUNDS = {
    "end early": (0, 2, 3),
    "end late": (0, 2, 6),
    "end far away": (0, 2, 10**6),
    "fall": (0, 3, 2, 4),
    "start late": (1, 2, 4),
    "say nothing": (),
}


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("wrong", WRONG_BOUNDS.values(), ids=list(WRONG_BOUNDS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_cu_seqlens_that_do_not_fit_are_refused(backend, wrong, which, monkeypatch):
    monkeypatch.setattr(inputs, "CHECK_ON_GPU", True)
    q, k, v = torch.ones(3, 4, 2, 8, device=DEVICE)
    ends = {"cu_seqlens_q": bounds(2, 4), "cu_seqlens_k": bounds(2, 4)}
    ends[which] = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
    message = f"{which} is .*, wants to rise from 0 to the 4 rows of {which[-1]}"
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, k, v, **ends, max_seqlen_q=9, max_seqlen_k=9, backend=backend)
    with pytest.raises(ValueError, match=message):
        attention_varlen(q, k, v, **ends, backend=backend)


def test_a_gpu_is_not_waited_for_unless_the_check_is_switched_on(monkeypatch):
    """Stands in for a GPU: a number that is read there counts."""
    reads = []

    class OnGpu:
        dtype, ndim, is_cuda = torch.int32, 1, True
        __len__ = lambda self: 3  # noqa: E731
        tolist = lambda self: reads.append(1) or [0, 3, 2]  # noqa: E731

    rows = torch.ones(4, 2, 8)
    keys, options = Keys(rows, rows, OnGpu(), max_seqlen=3), Options(cu_seqlens_q=OnGpu(), max_seqlen_q=3)
    inputs.check_call(rows, keys, options)
    assert not reads
    with pytest.raises(ValueError, match="max_seqlen_k is 1: 2 such sequences have fewer rows than k, which has 4"):
        inputs.check_call(rows, Keys(rows, rows, OnGpu(), max_seqlen=1), options)
    monkeypatch.setattr(inputs, "CHECK_ON_GPU", True)
    with pytest.raises(ValueError, match="wants to rise from 0 to the 4 rows of q"):
        inputs.check_call(rows, keys, options)
    assert reads


def test_a_max_seqlen_may_be_a_tensor_of_one_number():
    q, k, v = torch.ones(3, 4, 2, 8, device=DEVICE)
    for backend in ("tiled", *([] if MODE.name == "none" else ["triton"])):
        call = partial(flash_attn_varlen_func, q, k, v, bounds(1, 4), bounds(1, 4), backend=backend)
        assert torch.equal(call(torch.tensor(3), torch.tensor(3)), call(3, 3))
    with pytest.raises(TypeError):
        call(3.5, 3)

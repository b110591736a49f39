"""Second and forward-mode derivatives: right, or refused; never 0 and never without a tangent."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from kernels.runtime import prepare
from minillm.attention import attention, choose_backend, flash_attention, naive_attention, online_softmax_attention
from tests.attention.grid import random_qkv

ALL_ORDERS = {
    "naive": naive_attention,
    "online": partial(online_softmax_attention, block_k=3),
    "tiled": partial(flash_attention, block_q=2, block_k=3),
}
FUSED = ["sdpa", *(["triton"] if prepare().name == "interpreter" else [])]
CALLS = {
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "softcap": dict(causal=True, softcap=2.0),
    "rows that see nothing": dict(causal=True),
}


def small_qkv(call="causal"):
    seqlens = (4, 2) if call == "rows that see nothing" else (3, 4)
    return [x.requires_grad_() for x in random_qkv(seqlens, (2, 1), 2, torch.float64)]


def loss(function, q, k, v):
    return function(q, k, v, causal=True).square().sum()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ALL_ORDERS)
def test_forward_mode_equals_finite_differences(name, call):
    function = partial(ALL_ORDERS[name], return_lse=call != "rows that see nothing", **CALLS[call])
    assert gradcheck(function, small_qkv(call), check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize(
    "name, call",
    [*(("tiled", call) for call in ("window", "softcap", "rows that see nothing")), ("online", "softcap")],
)
def test_second_derivatives_equal_finite_differences(name, call):
    function = partial(ALL_ORDERS[name], return_lse=call != "rows that see nothing", **CALLS[call])
    assert gradgradcheck(function, small_qkv(call), check_fwd_over_rev=True)


@pytest.mark.parametrize("name", ["online", "tiled"])
def test_torch_func_differentiates_as_the_naive_attention(name):
    q, k, v = (x.detach() for x in small_qkv())

    def results(function):
        first = torch.func.grad(lambda q: loss(function, q, k, v))
        second = torch.func.grad(lambda q: (first(q) * q).sum())
        along = torch.func.jvp(lambda q: (first(q) * q).sum(), (q,), (q,))[1]
        return first(q), second(q), along, torch.func.jvp(lambda q: function(q, k, v), (q,), (q,))[1]

    torch.testing.assert_close(results(ALL_ORDERS[name]), results(naive_attention))


@pytest.mark.parametrize("backend", FUSED)
def test_a_fused_kernel_refuses_a_tangent_and_auto_finds_one_that_takes_it(backend):
    q, k, v = (x.detach() for x in small_qkv())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(ValueError, match=f"backend '{backend}' has .*no forward-mode derivative"):
            attention(dual, k, v, backend=backend)
        assert choose_backend(dual, k, v).name == "tiled"
        assert forward_ad.unpack_dual(attention(dual, k, v)).tangent.abs().max() > 0
        assert choose_backend(q, k, v, backend=backend).name == backend  # a tensor without a tangent
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: attention(q, k, v, backend=backend), (q,), (q,))


@pytest.mark.parametrize("backend", FUSED)
def test_a_fused_kernel_raises_where_its_gradient_is_differentiated(backend):
    q, k, v = small_qkv()
    function = partial(attention, backend=backend)
    (grad,) = torch.autograd.grad(loss(function, q, k, v), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="tiled|derivative for aten"):
        torch.autograd.grad(grad.sum(), q)
    with pytest.raises((RuntimeError, NotImplementedError), match="tiled|derivative for aten"):
        torch.autograd.functional.hvp(lambda q: loss(function, q, k, v), q.detach(), q.detach())

"""The kernels as torch operators: what torch.compile, autograd and its transforms make of them."""

import pytest
import torch
from torch.autograd import forward_ad

from benchmarks.correctness import random_ragged
from kernels.flash_attention import flash_attention
from kernels.runtime import prepare
from tests.attention.grid import random_qkv

DEVICE = "cuda" if prepare().name == "gpu" else "cpu"


def test_a_second_or_a_forward_derivative_is_refused_and_not_0():
    q, k, v = (x.to(DEVICE).requires_grad_() for x in random_qkv((5, 7), (2, 1), 16))
    (grad_q,) = torch.autograd.grad(flash_attention(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="a gradient of the Triton kernels is differentiated"):
        torch.autograd.grad(grad_q.sum(), q)
    with forward_ad.dual_level():
        q = forward_ad.make_dual(q.detach(), q.detach())
        with pytest.raises(ValueError, match="differentiated in forward mode"):
            flash_attention(q, k.detach(), v.detach())
        with pytest.raises(RuntimeError, match="no forward derivative"):
            torch.ops.kernels.flash_attention_forward(q, k.detach(), v.detach(), None, None, 5, 7, 0.25, -1, -1, 0.0)


CHEAP_CHECKS = ("test_schema", "test_faketensor")
OTHER_CHECKS = ("test_autograd_registration", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_torch_knows_the_operators(layout):
    """opcheck: schema, autograd, and the fake implementation that torch.compile traces with, against the real one."""
    (q, k, v), ragged = random_ragged([(9, 12)], (2, 1), 16, torch.float32, DEVICE)
    checks = CHEAP_CHECKS if layout == "ragged" else (*CHEAP_CHECKS, *OTHER_CHECKS)
    if layout == "padded":
        q, k, v, ragged = q[None], k[None], v[None], (None, None, 9, 12)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    arguments = (q, k, v, *ragged, 0.25, -1, 0, 0.0)
    torch.library.opcheck(torch.ops.kernels.flash_attention_forward, arguments, test_utils=checks)
    out, lse = torch.ops.kernels.flash_attention_forward(*arguments)
    grads = tuple(x.detach() for x in (out, lse, q, k, v, out, lse))
    torch.library.opcheck(torch.ops.kernels.flash_attention_backward, (*grads, *arguments[3:]), test_utils=checks)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_torch_compile_takes_a_call_in_one_piece_with_its_gradients(layout):
    (q, k, v), ragged = random_ragged([(17, 20)], (2, 1), 16, torch.float32, DEVICE)

    def layer(q, k, v):
        if layout == "ragged":
            return flash_attention(q * 2, k, v, ragged, causal=True)[0] + 1
        return flash_attention(q[None] * 2, k[None], v[None], causal=True)[0] + 1

    def results(layer):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = layer(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled), results(layer))

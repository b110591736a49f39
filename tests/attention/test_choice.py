"""`choose_backend` and the call: the same back end, or the same error; by any options, bad ones too."""

import itertools
import math

import pytest
import torch
from allpairspy import AllPairs

from minillm.attention import attention, choose_backend, naive_attention
from minillm.attention.backends import BACKENDS
from minillm.measure import assert_within_budget
from tests.attention.grid import random_qkv

OPTIONS = {
    "backend": ["auto", *BACKENDS, "flash"],
    "softmax_scale": [None, 0.3, 0.0, -0.3, 1e-3, math.nan, math.inf, -math.inf, torch.tensor(0.3)],
    "softcap": [0.0, 2.0, -1.0, math.nan, math.inf],
    "window_size": [(-1, -1), (2, 0), (-2, 0), (2**40, 2**40)],
    "causal": [False, True],
    "return_lse": [False, True],
    "block_q": [None, 4, 0],
}
SHAPES = [((3, 5), (4, 2), 8), ((3, 5), (3, 2), 8), ((1, 4), (2, 1), 300), ((2, 2), (1, 1), 0), ((0, 3), (2, 2), 4)]


def result_of(call):
    try:
        return call()
    except (ValueError, TypeError) as error:
        return type(error), str(error)


def every_pair():
    return [dict(zip(OPTIONS, values, strict=True)) for values in AllPairs(list(OPTIONS.values()))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_choose_backend_says_is_what_the_call_does(shape, monkeypatch):
    taken = []
    for name, backend in list(BACKENDS.items()):
        run = backend.run

        def spy(*call, name=name, run=run):
            taken.append(name)
            return run(*call)

        monkeypatch.setitem(BACKENDS, name, type(backend)(backend.strength, spy, backend.why_not, backend.slow))
    q, k, v = random_qkv(*shape)
    refused = 0
    for options in every_pair():
        taken.clear()
        choice, done = result_of(lambda o=options: choose_backend(q, k, v, **o)), None
        done = result_of(lambda o=options: attention(q, k, v, **o))
        if isinstance(choice, tuple):
            refused += 1
            assert done == choice and not taken, options
        else:
            assert taken == [choice.name] and not isinstance(done[0] if isinstance(done, tuple) else done, type), (
                options
            )
    assert refused


@pytest.mark.parametrize("name", ["batch", "heads"])
def test_what_one_launch_cannot_hold_is_refused_before_it(name):
    q = torch.zeros(1).expand((65536, 1, 1, 1) if name == "batch" else (1, 1, 65536, 1))
    assert "65535" in result_of(lambda: choose_backend(q, q, q, backend="triton"))[1]
    assert "65535" in result_of(lambda: attention(q, q, q, backend="triton"))[1]


@pytest.mark.parametrize("scale, causal", list(itertools.product([0.0, -0.3, -4.0, 4.0], [False, True])))
@pytest.mark.parametrize("backend", ["tiled", "sdpa"])
def test_any_finite_scale_is_within_the_budget(backend, scale, causal):
    q, k, v = random_qkv((33, 40), (4, 2), 16)
    options = dict(softmax_scale=scale, causal=causal)
    naive, reference = naive_attention(q, k, v, **options), naive_attention(*(x.double() for x in (q, k, v)), **options)
    assert_within_budget(attention(q, k, v, backend=backend, **options), naive, reference)

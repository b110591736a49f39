"""`choose_backend` and the call: the same back end, or the same error; by any options, bad ones too."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from allpairspy import AllPairs

from minillm.attention import attention, choose_backend, naive_attention
from minillm.attention.backends import BACKENDS, Choice
from minillm.measure import assert_within_budget
from tests.attention.grid import random_qkv

GOOD = {
    "backend": ["auto", *BACKENDS],
    "softmax_scale": [None, 0.3, 0.0, -0.3, 1e-3],
    "softcap": [0.0, 2.0],
    "window_size": [(-1, -1), (2, 0), (2**40, 2**40)],
    "causal": [False, True],
    "return_lse": [False, True],
    "block_q": [None, 4],
}
BAD = {
    "softmax_scale": [math.nan, math.inf, -math.inf, torch.tensor(0.3)],
    "softcap": [-1.0, math.nan, math.inf, torch.tensor(2.0)],
    "window_size": [(-2, 0), (1, 2, 3)],
    "block_q": [0],
    "backend": ["flash"],
}
SHAPES = [((3, 5), (4, 2), 8), ((3, 5), (3, 2), 8), ((1, 4), (2, 1), 300), ((2, 2), (1, 1), 0), ((0, 3), (2, 2), 4)]


def result_of(call):
    try:
        return call()
    except (ValueError, TypeError) as error:
        return type(error), str(error)


def calls():
    """Every pair of good values; each value with each back end alone; and bad ones, one at a time."""
    values = (values for values in AllPairs(list(GOOD.values())))
    yield from (dict(zip(GOOD, row, strict=True)) for row in values)
    for backend in GOOD["backend"]:
        for options in (GOOD, BAD):
            yield from ({"backend": backend, name: value} for name, values in options.items() for value in values)


@pytest.fixture
def taken(monkeypatch):
    """The names of the back ends that have run."""
    names = []
    for name, backend in BACKENDS.items():

        def run(*call, name=name, run=backend.run):
            names.append(name)
            return run(*call)

        monkeypatch.setitem(BACKENDS, name, replace(backend, run=run))
    return names


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_choose_backend_says_is_what_the_call_does(shape, taken):
    q, k, v = random_qkv(*shape)
    for options in calls():
        taken.clear()
        choice = result_of(lambda o=options: choose_backend(q, k, v, **o))
        done = result_of(lambda o=options: attention(q, k, v, **o))
        if isinstance(choice, Choice):
            assert taken == [choice.name], options
            assert isinstance(done, torch.Tensor) or isinstance(done[0], torch.Tensor), (options, done)
        else:
            assert done == choice and not taken, options


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD.items() for value in values], ids=str)
@pytest.mark.parametrize("backend", GOOD["backend"])
def test_what_makes_no_sense_is_refused_by_its_name(backend, name, value):
    q, k, v = random_qkv(*SHAPES[0])
    with pytest.raises((ValueError, TypeError), match=f"{name} is"):
        attention(q, k, v, **({"backend": backend} | {name: value}))


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

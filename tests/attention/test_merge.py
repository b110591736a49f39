"""The laws of the merge: any cut of the keys, in any order, is the same attention."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.attention import merge_state, naive_attention
from minillm.attention.online import OnlineSoftmax
from minillm.measure import assert_within_budget
from tests.attention.grid import random_qkv

QUERY = random_qkv((3, 1), (2, 2), 4, torch.float64)[0]


def states(draw_seed: int, lengths: list[int], magnitude: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (out, lse) for each set of keys; a set may be empty."""
    parts = []
    for index, length in enumerate(lengths):
        _, k, v = random_qkv((3, length), (2, 2), 4, torch.float64, seed=draw_seed + index, magnitude=magnitude)
        parts.append(naive_attention(QUERY * magnitude, k, v, return_lse=True))
    return parts


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert not x.isnan().any()
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


three_sets = st.lists(st.integers(0, 6), min_size=3, max_size=3)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), three_sets, st.sampled_from([1.0, 30.0]))
def test_merge_is_associative_and_commutative(seed, lengths, magnitude):
    a, b, c = states(seed, lengths, magnitude)
    assert_same(merge_state(*merge_state(*a, *b), *c), merge_state(*a, *merge_state(*b, *c)))
    assert_same(merge_state(*a, *b), merge_state(*b, *a))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), three_sets)
def test_merging_the_parts_is_attention_over_the_whole(seed, lengths):
    parts = [random_qkv((3, length), (2, 2), 4, torch.float64, seed=seed + i) for i, length in enumerate(lengths)]
    k, v = (torch.cat([part[i] for part in parts], dim=1) for i in (1, 2))
    a, b, c = (naive_attention(QUERY, part[1], part[2], return_lse=True) for part in parts)
    assert_same(merge_state(*merge_state(*a, *b), *c), naive_attention(QUERY, k, v, return_lse=True))


def test_nothing_is_the_neutral_element():
    (state,) = states(0, [5], 1.0)
    nothing = (torch.zeros_like(state[0]), torch.full_like(state[1], -torch.inf))
    assert_same(merge_state(*state, *nothing), state)
    assert_same(merge_state(*nothing, *nothing), nothing)


def test_the_gradient_of_a_merge_with_nothing_is_finite():
    nothing = (torch.zeros_like(QUERY), torch.full((1, 2, 3), -torch.inf, dtype=torch.float64))
    (state,) = states(0, [5], 1.0)
    for left, right in ((state, nothing), (nothing, state), (nothing, nothing)):
        leaves = [x.clone().requires_grad_() for x in (*left, *right)]
        out, lse = merge_state(*leaves)
        (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
        assert all(x.grad.isfinite().all() for x in leaves)


def test_an_online_update_is_a_merge():
    generator = torch.Generator().manual_seed(0)
    scores, values = (torch.randn(shape, generator=generator) for shape in ((1, 2, 3, 40), (1, 2, 40, 4)))
    online = OnlineSoftmax((1, 2, 3), 4, torch.float32)
    pieces = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
        online.update(scores[..., part], values[..., part, :])
        alone = OnlineSoftmax((1, 2, 3), 4, torch.float32)
        alone.update(scores[..., part], values[..., part, :])
        out, lse = alone.finish()
        pieces.append((out.transpose(1, 2), lse))
    merged = merge_state(*merge_state(*pieces[0], *pieces[1]), *pieces[2])
    out, lse = online.finish()
    torch.testing.assert_close(merged, (out.transpose(1, 2), lse))


def test_a_hundred_thousand_elements_one_by_one_stay_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 100_000, generator=generator) * 5
    values = torch.randn(100_000, 1, generator=generator)
    online = OnlineSoftmax((1,), 1, torch.float32)
    for start in range(0, 100_000, 50):
        online.update(scores[:, start : start + 50], values[start : start + 50])
    reference = scores.double().softmax(-1) @ values.double()
    assert_within_budget(online.finish()[0], scores.softmax(-1) @ values, reference)


def test_merge_names_shapes_that_do_not_belong_together():
    (state,) = states(0, [5], 1.0)
    try:
        merge_state(*state, state[0][:, :2], state[1])
    except ValueError as error:
        assert "out_b has shape (1, 2, 2, 4)" in str(error)
    else:
        raise AssertionError("merge_state took tensors of different shapes")

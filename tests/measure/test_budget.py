"""The error budget: twice what the naive method gets wrong passes; NaN, other infinities and other shapes never do."""

import pytest
import torch

from minillm.measure import assert_within_budget, error_budget

REFERENCE = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
NAIVE = REFERENCE.float() + 0.01
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("error", "within"), [(0.019, True), (0.021, False)])
def test_twice_the_naive_methods_error_is_allowed(error, within):
    assert bool(error_budget(REFERENCE.float() - error, NAIVE, REFERENCE)) == within


@pytest.mark.parametrize(("error", "within"), [(0.029, True), (0.031, False)])
def test_three_times_for_gradients(error, within):
    assert bool(error_budget(REFERENCE.float() + error, NAIVE, REFERENCE, factor=3)) == within


def test_where_the_naive_method_is_exact_a_few_roundings_are_allowed():
    naive = REFERENCE.float()
    assert error_budget(naive * (1 + 2 * EPS), naive, REFERENCE)
    assert not error_budget(naive * (1 + 8 * EPS), naive, REFERENCE)
    assert error_budget(naive * (1 + 8 * EPS), naive, REFERENCE, multiple=16)


def test_nan_never_passes():
    ours = NAIVE.clone()
    ours[1] = torch.nan
    budget = error_budget(ours, torch.full_like(NAIVE, torch.nan), REFERENCE)
    assert not budget and "1 NaN" in str(budget)


def test_infinities_must_match_exactly():
    with_inf = REFERENCE.clone()
    with_inf[0] = -torch.inf
    assert error_budget(with_inf.float(), with_inf.float(), with_inf)
    for ours in (REFERENCE, -with_inf, torch.full_like(REFERENCE, -torch.inf)):
        budget = error_budget(ours.float(), NAIVE, with_inf)
        assert not budget and "infinities differ" in str(budget)


def test_another_shape_is_told():
    assert "shape (1, 3), expected (3,)" in str(error_budget(NAIVE[None], NAIVE, REFERENCE))


def test_empty_tensors_are_equal():
    assert error_budget(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))


def test_an_assertion_names_error_and_budget():
    assert_within_budget(NAIVE, NAIVE, REFERENCE)
    with pytest.raises(AssertionError, match=r"error 1\.0e\+00, budget 2\.0e-02: over"):
        assert_within_budget(REFERENCE.float() + 1, NAIVE, REFERENCE)

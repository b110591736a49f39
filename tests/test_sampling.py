"""Sampling: the same distribution as transformers', draws that follow it, and rows that never come out empty."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minillm.sampling import next_token_probabilities, sample

LOGITS = torch.randn(5, 111, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 10, 500])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    ours = next_token_probabilities(LOGITS, temperature, top_k, top_p, min_p)
    theirs = warpers(None, LOGITS).softmax(-1)
    assert torch.equal(ours > 0, theirs > 0)
    assert (ours - theirs).abs().max() <= 8 * torch.finfo(torch.float32).eps


def test_draws_follow_the_distribution():
    probabilities = next_token_probabilities(LOGITS[:1], 0.9, top_k=20, top_p=0.95)
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    draws = sample(LOGITS[:1].expand(count, -1), temperature=0.9, top_k=20, top_p=0.95, generator=generator)
    expected = probabilities[0] * count
    seen = torch.bincount(draws, minlength=111).double()
    kept = expected > 0
    assert not seen[~kept].any()
    chi_square = ((seen - expected) ** 2 / expected)[kept].sum().item()
    degrees = int(kept.sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


def test_temperature_0_takes_the_largest():
    assert torch.equal(sample(LOGITS, temperature=0), LOGITS.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300])
def test_a_temperature_near_0_takes_the_largest_too(temperature):
    assert torch.equal(sample(LOGITS, temperature=temperature), LOGITS.argmax(-1))
    assert torch.equal(sample(100 * LOGITS.double(), temperature=temperature, top_p=0.9), LOGITS.argmax(-1))


@settings(max_examples=200, deadline=None)
@given(
    # In steps that fp32 tells apart after the division by the temperature: else the largest one ties with others.
    logits=st.lists(st.integers(-10_000, 10_000).map(lambda n: n / 10), min_size=1, max_size=12),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 15),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
)
def test_any_setting_leaves_a_distribution_that_holds_a_largest(logits, temperature, top_k, top_p, min_p):
    logits = torch.tensor([logits])
    probabilities = next_token_probabilities(logits, temperature, top_k, top_p, min_p)
    assert (probabilities[logits == logits.max()] > 0).any()
    assert abs(probabilities.sum().item() - 1) < 1e-5

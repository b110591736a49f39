"""Answers to `merge`."""

import torch

from tests.exercises.answers import Wrong, changed


def by_sigmoid(out_a, lse_a, out_b, lse_b):
    """The share of a is the sigmoid of the difference; where both are empty, the difference is set to 0."""
    none = (lse_a == -torch.inf) & (lse_b == -torch.inf)
    share = torch.sigmoid((lse_a - lse_b).masked_fill(none, 0)).transpose(1, 2).unsqueeze(-1)
    lse = torch.where(none, lse_a, torch.logaddexp(lse_a, lse_b))
    return share * out_a + (1 - share) * out_b, lse


def stacked(out_a, lse_a, out_b, lse_b):
    """Softmax over the two lse, with -inf made a very small number."""
    lses = torch.stack([lse_a, lse_b])
    shares = lses.clamp(min=-1e30).softmax(0)
    shares = shares.masked_fill(lses == -torch.inf, 0)
    outs = torch.stack([out_a, out_b])
    return torch.einsum("nbhs,nbshd->bshd", shares, outs), lses.logsumexp(0)


RIGHT = {"sigmoid": by_sigmoid, "stacked": stacked}


def shifted(out_a, lse_a, out_b, lse_b):
    """As it is taught, but without a thought for empty parts; the slips below are made in it."""
    m = torch.maximum(lse_a, lse_b)
    a, b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    total = a + b
    out = (a / total).transpose(1, 2)[..., None] * out_a + (b / total).transpose(1, 2)[..., None] * out_b
    return out, m + torch.log(total)


def not_shifted(out_a, lse_a, out_b, lse_b):
    a, b = lse_a.exp().transpose(1, 2)[..., None], lse_b.exp().transpose(1, 2)[..., None]
    return (a * out_a + b * out_b) / (a + b), (lse_a.exp() + lse_b.exp()).log()


def averaged(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


def added(out_a, lse_a, out_b, lse_b):
    return out_a + out_b, torch.logaddexp(lse_a, lse_b)


def larger_wins(out_a, lse_a, out_b, lse_b):
    first = (lse_a >= lse_b).transpose(1, 2)[..., None]
    return torch.where(first, out_a, out_b), torch.logaddexp(lse_a, lse_b)


def by_lse_itself(out_a, lse_a, out_b, lse_b):
    share = (lse_a / (lse_a + lse_b)).transpose(1, 2)[..., None]
    return share * out_a + (1 - share) * out_b, torch.logaddexp(lse_a, lse_b)


WRONG = [
    Wrong("both empty gives NaN", shifted, "−∞ − (−∞) is NaN. The result is 0, its lse −∞"),
    Wrong("no shift", not_shifted, "exp of an lse overflows: subtract the larger one first"),
    Wrong("average", averaged, "plain average"),
    Wrong("sum", added, "added up: both are normalised already"),
    Wrong("the larger one alone", larger_wins, "the part with the smaller lse is lost"),
    Wrong("shares of lse, not of exp", by_lse_itself, "count by their lse"),
    changed(by_sigmoid, "(lse_a - lse_b)", "(lse_b - lse_a)", name="swapped", told="the weights are swapped"),
    changed(by_sigmoid, "(lse_a - lse_b)", "((lse_a - lse_b) * 0.6931472)", name="base 2", told="weights are in base 2"),
    changed(shifted, " / total", "", name="not normalised", told="do not add up to 1"),
    changed(by_sigmoid, ".transpose(1, 2).unsqueeze(-1)", ".reshape(out_a.shape[:3])[..., None]",
            name="reshaped, not transposed", told="transpose the weights"),
    changed(by_sigmoid, ".transpose(1, 2).unsqueeze(-1)", ".unsqueeze(-1)", name="axes crossed", told="RuntimeError"),
    changed(by_sigmoid, "torch.logaddexp(lse_a, lse_b)", "torch.maximum(lse_a, lse_b)",
            name="lse is the larger", told="the new lse is the larger of the two"),
    changed(by_sigmoid, "torch.logaddexp(lse_a, lse_b)", "lse_a + lse_b",
            name="lse added", told="the new lse is the sum of the two"),
    changed(by_sigmoid, "torch.logaddexp(", "torch.logaddexp2(", name="lse in base 2", told="the new lse is in base 2"),
    changed(shifted, "m + torch.log(total)", "torch.log(total)", name="shift lost", told="the new lse lacks its shift"),
]

"""Answers to `merge_two`, a stop of lesson 02."""

import torch

from tests.exercises.answers import Wrong, changed


def by_sigmoid(out_a, lse_a, out_b, lse_b):
    share = torch.sigmoid(lse_a - lse_b)[:, None]
    return share * out_a + (1 - share) * out_b, torch.logaddexp(lse_a, lse_b)


def stacked(out_a, lse_a, out_b, lse_b):
    lses = torch.stack([lse_a, lse_b])
    return torch.einsum("nr,nrd->rd", lses.softmax(0), torch.stack([out_a, out_b])), lses.logsumexp(0)


RIGHT = {"sigmoid": by_sigmoid, "stacked": stacked}


def shifted(out_a, lse_a, out_b, lse_b):
    m = torch.maximum(lse_a, lse_b)
    a, b = torch.exp(lse_a - m), torch.exp(lse_b - m)
    l = a + b
    return (a / l)[:, None] * out_a + (b / l)[:, None] * out_b, m + torch.log(l)


def by_the_formula(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    return torch.exp(lse_a - lse)[:, None] * out_a + torch.exp(lse_b - lse)[:, None] * out_b, lse


WRONG = [
    Wrong("weights from lse", by_the_formula, "right to some 4 digits: near ±1000 the new lse is rounded"),
    changed(shifted, " - m)", ")", name="no shift", told="exp of an lse overflows, or all are 0"),
    changed(shifted, " / l)", ")", name="not divided", told="do not add up to 1"),
    changed(shifted, "m + torch.log(l)", "torch.log(l)", name="shift lost", told="the new lse lacks its shift"),
    changed(shifted, "[:, None]", "", name="not per row", told="RuntimeError"),
    changed(by_sigmoid, "lse_a - lse_b", "lse_b - lse_a", name="swapped", told="the weights are swapped"),
    changed(by_sigmoid, "lse_a - lse_b", "(lse_a - lse_b) * 0.6931472", name="base 2", told="the powers are of 2"),
    changed(by_sigmoid, "logaddexp", "logaddexp2", name="lse in base 2", told="the new lse is in base 2"),
    changed(by_sigmoid, "torch.logaddexp(", "torch.maximum(", name="the larger lse", told="the larger of the two"),
    changed(by_sigmoid, "torch.logaddexp(", "torch.add(", name="lse added", told="the new lse is the sum of the two"),
    changed(by_sigmoid, "share = ", "share = 0.5 + 0 * ", name="average", told="plain average"),
    changed(stacked, "lses.softmax(0)", "torch.ones_like(lses)", name="sum", told="added up: both are normalised"),
    changed(stacked, "lses.softmax(0)", "lses / lses.sum(0)", name="by lse", told="count by their lse"),
    changed(shifted, "torch.maximum(lse_a, lse_b)", "torch.maximum(lse_a, lse_b).max()", name="one shift for all rows",
            told="one lse is subtracted in all rows"),
]

"""Answers to `merge`."""

import torch

from tests.exercises.answers import Wrong, changed


def by_softmax(outs, lses):
    """Softmax over the parts; where all are empty, it is NaN and set to 0."""
    shares = lses.softmax(0).nan_to_num(0)
    return torch.einsum("pbhs,pbshd->bshd", shares, outs), lses.logsumexp(0)


def part_by_part(outs, lses):
    """A loop over the parts, as over blocks of keys: m, l and acc, divided once."""
    m, l, acc = torch.full_like(lses[0], -torch.inf), torch.zeros_like(lses[0]), torch.zeros_like(outs[0])
    for out, lse in zip(outs, lses, strict=True):
        new = torch.maximum(m, lse)
        shift = torch.where(new == -torch.inf, 0, new)
        old, weight = torch.exp(m - shift), torch.exp(lse - shift)
        l, acc = l * old + weight, acc * old.mT[..., None] + weight.mT[..., None] * out
        m = new
    return acc / l.clamp(min=1e-30).mT[..., None], m + l.log()


def pairs_in_float64(outs, lses):
    """A chain of pairs: exact enough, since it rounds in float64."""
    out, lse = outs[0].double(), lses[0].double()
    for other, other_lse in zip(outs[1:].double(), lses[1:].double(), strict=True):
        none = (lse == -torch.inf) & (other_lse == -torch.inf)
        share = torch.sigmoid((lse - other_lse).masked_fill(none, 0)).mT.unsqueeze(-1)
        out, lse = share * out + (1 - share) * other, torch.logaddexp(lse, other_lse)
    return out.float(), lse.float()


RIGHT = {"softmax": by_softmax, "part by part": part_by_part, "pairs in float64": pairs_in_float64}


def shifted(outs, lses):
    """As it is taught, but without a thought for empty parts; the slips below are made in it."""
    m = lses.amax(0)
    weights = torch.exp(lses - m)
    total = weights.sum(0)
    out = ((weights / total).transpose(2, 3)[..., None] * outs).sum(0)
    return out, m + torch.log(total)


def not_shifted(outs, lses):
    weights = lses.exp()
    total = weights.sum(0)
    return (weights.mT[..., None] * outs).sum(0) / total.mT[..., None], total.log()


def by_the_formula(outs, lses):
    """The weight of each part is exp(its lse − lse of all): the digits of an lse near 1000 do not suffice."""
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0))
    return torch.einsum("pbhs,pbshd->bshd", weights, outs), lse


def averaged(outs, lses):
    return outs.mean(0), lses.logsumexp(0)


def added(outs, lses):
    return outs.sum(0), lses.logsumexp(0)


def largest_wins(outs, lses):
    first = lses.argmax(0).transpose(1, 2)[None, ..., None]
    return outs.gather(0, first.expand(1, *outs.shape[1:]))[0], lses.logsumexp(0)


def by_lse_itself(outs, lses):
    return torch.einsum("pbhs,pbshd->bshd", lses / lses.sum(0), outs), lses.logsumexp(0)


WRONG = [
    Wrong("all empty gives NaN", shifted, "where all parts are empty, −∞ − (−∞) and 0 / 0 are NaN"),
    Wrong("no shift", not_shifted, "exp of an lse overflows, or all are 0: subtract the row's largest one first"),
    Wrong("weights from lse", by_the_formula, "right to some 4 digits: near ±1000 an lse that you compute is rounded"),
    changed(pairs_in_float64, ".double()", "", name="pairs in float32", told="of all parts at once, and divide"),
    Wrong("average", averaged, "plain average"),
    Wrong("sum", added, "added up: they are normalised already"),
    Wrong("the largest one alone", largest_wins, "only the part with the largest lse is there"),
    Wrong("shares of lse, not of exp", by_lse_itself, "count by their lse"),
    changed(
        by_softmax, "lses.softmax(0)", "(-lses).softmax(0)", name="upside down", told="the weights are upside down"
    ),
    changed(
        by_softmax, "lses.softmax(0)", "(lses * 0.6931472).softmax(0)", name="base 2", told="weights are in base 2"
    ),
    changed(
        by_softmax, ".softmax(0)", ".softmax(2)", name="softmax over heads", told="shares of the heads add up to 1"
    ),
    changed(
        by_softmax, ".softmax(0)", ".softmax(-1)", name="softmax over queries", told="shares of the queries add up to 1"
    ),
    changed(by_softmax, "lses.softmax(0)", "lses[:2].softmax(0)", name="the first two", told="RuntimeError"),
    changed(
        part_by_part,
        "zip(outs, lses, strict=True)",
        "zip(outs[:2], lses[:2], strict=True)",
        name="the first two parts",
        told="only the first two parts are merged",
    ),
    changed(
        part_by_part,
        "zip(outs, lses, strict=True)",
        "list(zip(outs, lses, strict=True))[: max(1, len(outs) - 1)]",
        name="last part lost",
        told="the last part is lost",
    ),
    changed(
        by_softmax,
        "    shares =",
        "    outs, lses = outs[:1], lses[:1]\n    shares =",
        name="the first part",
        told="only the first part is there",
    ),
    changed(shifted, " / total", "", name="not normalised", told="do not add up to 1"),
    changed(
        shifted, "lses.amax(0)", "lses.amax()", name="one shift for all rows", told="one largest lse is subtracted"
    ),
    changed(by_softmax, "pbhs,pbshd", "pbsh,pbshd", name="axes crossed", told="transpose the weights"),
    changed(
        shifted,
        ".transpose(2, 3)[..., None]",
        ".reshape(outs.shape[:4])[..., None]",
        name="reshaped",
        told="transpose the weights",
    ),
    changed(
        by_softmax, "lses.logsumexp(0)", "lses.amax(0)", name="lse is the largest", told="the new lse is the largest"
    ),
    changed(by_softmax, "lses.logsumexp(0)", "lses.sum(0)", name="lse added", told="the new lse is the sum of all"),
    changed(by_softmax, "lses.logsumexp(0)", "lses.mean(0)", name="lse averaged", told="the new lse is the average"),
    changed(
        by_softmax,
        "lses.logsumexp(0)",
        "torch.log2(torch.exp2(lses).sum(0))",
        name="lse in base 2",
        told="the new lse is in base 2",
    ),
    changed(
        shifted, "torch.log(total)", "torch.log2(total)", name="log2", told="log2 of the sum is no natural logarithm"
    ),
    changed(shifted, "m + torch.log(total)", "torch.log(total)", name="shift lost", told="the new lse lacks its shift"),
    changed(
        by_softmax,
        "    shares =",
        "    lses = lses.clamp(min=-1e9)\n    shares =",
        name="−∞ made a number",
        told="an empty part counts nothing, and if all are empty",
    ),
]

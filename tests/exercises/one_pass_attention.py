"""Answers to `one_pass_attention`."""

import torch

from tests.exercises.answers import Wrong, changed


def in_columns(q, k, v, block):
    """m, l and acc as (rows, 1) columns, the scale in q."""
    q = q / q.shape[1] ** 0.5
    m = q.new_full((len(q), 1), -torch.inf)
    l, acc = torch.zeros_like(m), torch.zeros_like(q)
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        s = q @ keys.T
        new = torch.maximum(m, s.max(1, keepdim=True).values)
        p = torch.exp(s - new)
        old = torch.exp(m - new)
        l = l * old + p.sum(1, keepdim=True)
        acc = acc * old + p @ values
        m = new
    return acc / l, (m + torch.log(l)).squeeze(1)


def by_merging(q, k, v, block):
    """Each block by itself, then merged: no running maximum is carried, only out and lse."""
    out, lse = torch.zeros_like(q), torch.full((len(q),), -torch.inf)
    for start in range(0, len(k), block):
        scores = q @ k[start : start + block].T * q.shape[1] ** -0.5
        block_lse = scores.logsumexp(-1)
        block_out = scores.softmax(-1) @ v[start : start + block]
        both = torch.logaddexp(lse, block_lse)
        out = (lse - both).exp()[:, None] * out + (block_lse - both).exp()[:, None] * block_out
        lse = both
    return out, lse


RIGHT = {"columns": in_columns, "blocks merged": by_merging}


def padded(q, k, v, block):
    missing = -len(k) % block
    k = torch.cat([k, torch.zeros(missing, k.shape[1])])
    v = torch.cat([v, torch.zeros(missing, v.shape[1])])
    return in_columns(q, k, v, block)


def whole_blocks_only(q, k, v, block):
    n = len(k) // block * block
    return in_columns(q, k[:n], v[:n], block)


def scores_collected(q, k, v, block):
    scores = torch.cat([q @ part.T for part in k.split(block)], dim=1) / q.shape[1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def all_at_once(q, k, v, block):
    scores = q @ k.T / q.shape[1] ** 0.5
    m = scores.amax(-1, keepdim=True)
    p = (scores - m).exp()
    l = p.sum(-1, keepdim=True)
    return p @ v / l, (m + l.log())[:, 0]


def no_maximum(q, k, v, block):
    l, acc = torch.zeros(len(q), 1), torch.zeros_like(q)
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        p = (q @ keys.T / q.shape[1] ** 0.5).exp()
        l, acc = l + p.sum(1, keepdim=True), acc + p @ values
    return acc / l, l.log()[:, 0]


def blocks_averaged(q, k, v, block):
    parts = [all_at_once(q, *part, block) for part in zip(k.split(block), v.split(block), strict=True)]
    out = torch.stack([out for out, _ in parts]).mean(0)
    return out, torch.stack([lse for _, lse in parts]).logsumexp(0)


WRONG = [
    changed(in_columns, "acc * old", "acc", name="acc not rescaled", told="acc is not rescaled"),
    changed(in_columns, "l * old", "l", name="l not rescaled", told="l is not rescaled"),
    changed(in_columns, "old = torch.exp(m - new)", "old = 1", name="nothing rescaled", told="nothing is rescaled"),
    changed(in_columns, "torch.exp(m - new)", "torch.exp(new - m)", name="rescale upside down", told="exp(m − m_new)"),
    changed(in_columns, "torch.exp(", "torch.exp2(", name="base 2", told="base 2: multiply the scores"),
    changed(in_columns, "torch.log(l)", "torch.log2(l)", name="log2 of l", told="log2"),
    changed(by_merging, "return out, lse", "return out, lse / 0.6931472", name="lse in base 2", told="lse is in base 2"),
    changed(in_columns, "m + torch.log(l)", "torch.log(l)", name="lse without m", told="lse lacks the largest score"),
    changed(in_columns, "m + torch.log(l)", "m", name="lse is m", told="lse is the largest score alone"),
    changed(in_columns, "(m + torch.log(l))", "l", name="lse is l", told="lse is l, and not its logarithm"),
    changed(in_columns, ".squeeze(1)", "", name="lse as a column", told="lse has shape (5, 1), expected (5,)"),
    changed(in_columns, "acc / l,", "acc,", name="not divided", told="not divided by l"),
    changed(in_columns, " / q.shape[1] ** 0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(in_columns, "q.shape[1] ** 0.5", "q.shape[1]", name="scaled twice", told="divided by d instead of √d"),
    Wrong("tail dropped", whole_blocks_only, "the last keys are missing"),
    Wrong("tail padded, not masked", padded, "padded and not masked"),
    Wrong("no largest score", no_maximum, "exp overflows: subtract the largest score so far"),
    Wrong("blocks averaged", blocks_averaged, "plain average of the blocks"),
    Wrong("scores collected", scores_collected, "the scores of all keys are in memory", kept=True),
    Wrong("all keys at once", all_at_once, "the scores of all keys are in memory", kept=True),
]

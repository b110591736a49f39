"""Answers to the writing stop `grouped_attention`."""

import torch

from tests.exercises.answers import Wrong, changed


def head_by_head(q, k, v):
    h, hk, d = q.shape[2], k.shape[2], q.shape[3]
    out = torch.empty_like(q)
    for i in range(h):
        j = i // (h // hk)
        scores = q[:, :, i] @ k[:, :, j].transpose(1, 2) / d**0.5
        out[:, :, i] = scores.softmax(-1) @ v[:, :, j]
    return out


def heads_in_front(q, k, v):
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return out.transpose(1, 2)


RIGHT = {"head by head": head_by_head, "heads in front": heads_in_front}


def across_heads(q, k, v):
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def masked(q, k, v):
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def pytorchs_own(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


WRONG = [
    changed(head_by_head, "i // (h // hk)", "i % hk", name="interleaved", told="interleaved over the KV heads"),
    changed(head_by_head, "i // (h // hk)", "0", name="the first KV head alone", told="read the first KV head"),
    changed(head_by_head, " / d**0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(head_by_head, "d**0.5", "d", name="scaled twice", told="divided by d instead of √d"),
    changed(heads_in_front, "softmax(-1)", "softmax(-2)", name="over the queries", told="runs over the queries"),
    changed(heads_in_front, "softmax(-1)", "softmax(1)", name="over the heads", told="runs over the heads"),
    changed(
        heads_in_front, "return out.transpose(1, 2)", "return out", name="heads left in front", told="out has shape"
    ),
    changed(
        heads_in_front, "repeat_interleave(group, 1)", "repeat(1, 1, 1, 1)", name="not repeated", told="RuntimeError"
    ),
    Wrong("across the heads of a token", across_heads, "the product is over the heads of one token"),
    Wrong("with a causal mask", masked, "there is no mask here"),
    Wrong("PyTorch's attention", pytorchs_own, "calls scaled_dot_product_attention"),
]

"""Answers to `gqa_decode`."""

import torch

from tests.exercises.answers import Wrong, changed


def grouped(q, keys, values, lengths):
    """Masks the scores, and takes what lies behind a length out of the values."""
    b, h, d = q.shape
    slots, hk = keys.shape[1:3]
    behind = torch.arange(slots) >= lengths[:, None]  # (b, slots)
    scores = q.view(b, hk, h // hk, d) @ keys.permute(0, 2, 3, 1) / d**0.5
    weights = scores.masked_fill(behind[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values.masked_fill(behind[:, :, None, None], 0).transpose(1, 2)).reshape(b, h, d)


def head_by_head(q, keys, values, lengths):
    """A view of the cache for each head."""
    b, h, d = q.shape
    out = torch.empty_like(q)
    for row in range(b):
        n = int(lengths[row])
        for head in range(h):
            k, v = (x[row, :n, head * keys.shape[2] // h] for x in (keys, values))
            out[row, head] = torch.softmax(k @ q[row, head] / d**0.5, dim=0) @ v
    return out


def by_einsum(q, keys, values, lengths):
    """Unused slots get the value 0 in place, and −∞ as score."""
    b, h, d = q.shape
    for row, n in enumerate(lengths):
        keys[row, n:], values[row, n:] = 0, 0
    scores = torch.einsum("bkgd,bskd->bkgs", q.reshape(b, keys.shape[2], -1, d), keys) * d**-0.5
    scores[(torch.arange(keys.shape[1]) >= lengths[:, None])[:, None, None].expand_as(scores)] = -torch.inf
    return torch.einsum("bkgs,bskd->bkgd", scores.softmax(dim=-1), values).reshape(b, h, d)


RIGHT = {"grouped": grouped, "head by head": head_by_head, "einsum": by_einsum}


def repeated(q, keys, values, lengths):
    group = q.shape[1] // keys.shape[2]
    rows = []
    for row, n in enumerate(lengths.tolist()):
        k, v = (x[row, :n].repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
        scores = (k @ q[row, :, :, None])[..., 0] / q.shape[2] ** 0.5
        rows.append((scores.softmax(-1)[:, None] @ v)[:, 0])
    return torch.stack(rows)


def scores_masked_only(q, keys, values, lengths):
    b, h, d = q.shape
    hk = keys.shape[2]
    behind = torch.arange(keys.shape[1]) >= lengths[:, None]
    scores = q.view(b, hk, h // hk, d) @ keys.permute(0, 2, 3, 1) / d**0.5
    weights = scores.masked_fill(behind[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values.transpose(1, 2)).reshape(b, h, d)


def in_float64(q, keys, values, lengths):
    return grouped(q.double(), keys.double(), values.double(), lengths).float()


def by_the_library(q, keys, values, lengths):
    rows = []
    for row, n in enumerate(lengths.tolist()):
        k, v = (x[row, :n].transpose(0, 1)[None] for x in (keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(q[row, None, :, None], k, v, enable_gqa=True)
        rows.append(out[0, :, 0])
    return torch.stack(rows)


WRONG = [
    Wrong("a copy in float64", in_float64, "a copy of the cache in float64 64 MiB", kept=True),
    Wrong("the library's attention", by_the_library, "it calls scaled_dot_product_attention"),
    Wrong("the cache is repeated", repeated, "K and V repeated for every query head would be 512 MiB", kept=True),
    Wrong("NaN times 0", scores_masked_only, "0 · NaN is NaN: leave those slots out"),
    changed(head_by_head, "head * keys.shape[2] // h", "head % keys.shape[2]", name="interleaved", told="interleaved"),
    changed(head_by_head, "head * keys.shape[2] // h", "0", name="first KV head", told="read the first KV head"),
    changed(
        head_by_head,
        "n = int(lengths[row])",
        "n = int(lengths[row]) - 1 or 1",
        name="one too few",
        told="the last token is not seen",
    ),
    changed(
        head_by_head,
        "n = int(lengths[row])",
        "n = int(lengths.max())",
        name="longest",
        told="each row is read to the longest length",
    ),
    changed(head_by_head, " / d**0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(head_by_head, " / d**0.5", " / d", name="scale twice", told="instead of √d"),
    changed(
        head_by_head,
        "n = int(lengths[row])",
        "n = int(lengths[0])",
        name="first row's length",
        told="each row is read to the first row's length",
    ),
    changed(
        head_by_head,
        "n = int(lengths[row])",
        "n = int(lengths[row]) + 1",
        name="one too many",
        told="one slot too many is seen",
    ),
    changed(
        head_by_head,
        "n = int(lengths[row])",
        "n = keys.shape[1]",
        name="all slots",
        told="behind the row's length was read",
    ),
    changed(
        grouped,
        ".softmax(-1)",
        ".softmax(-2).nan_to_num()",
        name="softmax over heads",
        told="runs over the query heads",
    ),
    changed(grouped, ".reshape(b, h, d)", "", name="groups left apart", told="out has shape"),
]

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


RIGHT = {"grouped": grouped, "head by head": head_by_head}


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


WRONG = [
    Wrong("the cache is repeated", repeated, "repeated for each query head", kept=True),
    Wrong("NaN times 0", scores_masked_only, "masking the scores alone is not enough"),
    changed(head_by_head, "head * keys.shape[2] // h", "head % keys.shape[2]", name="interleaved", told="interleaved"),
    changed(head_by_head, "head * keys.shape[2] // h", "0", name="first KV head", told="read the first KV head"),
    changed(head_by_head, "n = int(lengths[row])", "n = int(lengths[row]) - 1 or 1", name="one too few", told="the last token is not seen"),
    changed(head_by_head, "n = int(lengths[row])", "n = int(lengths.max())", name="longest", told="behind the row's length was read"),
    changed(head_by_head, " / d**0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(head_by_head, " / d**0.5", " / d", name="scale twice", told="instead of √d"),
]

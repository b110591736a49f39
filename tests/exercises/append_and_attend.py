"""Answers to `append_and_attend`."""

import torch

from tests.exercises.answers import Wrong, changed


def by_padding(q, k, v, keys, values, length):
    """Grows by padding, and masks by comparing positions."""
    new, stop = len(q), length + len(q)
    while len(keys) < stop:
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, len(x))) for x in (keys, values))
    keys, values = keys.clone(), values.clone()
    keys[length:stop], values[length:stop] = k, v
    scores = q @ keys[:stop].T / q.shape[1] ** 0.5
    hidden = torch.arange(stop)[None] > torch.arange(length, length + new)[:, None]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values[:stop], keys, values


def row_by_row(q, k, v, keys, values, length):
    """One token at a time: then there is nothing to mask."""
    outs = []
    for i in range(len(q)):
        if length == len(keys):
            keys, values = torch.cat([keys, keys]), torch.cat([values, values])
        keys, values = keys.clone(), values.clone()
        keys[length], values[length] = k[i], v[i]
        length += 1
        outs.append((q[i] @ keys[:length].T / q.shape[1] ** 0.5).softmax(-1) @ values[:length])
    return (torch.stack(outs) if outs else q), keys, values


RIGHT = {"padding": by_padding, "row by row": row_by_row}


def all_slots(q, k, v, keys, values, length):
    new = len(q)
    while len(keys) < length + new:
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, len(x))) for x in (keys, values))
    keys[length : length + new], values[length : length + new] = k, v
    return (q @ keys.T / q.shape[1] ** 0.5).softmax(-1) @ values, keys, values


def exact_growth(q, k, v, keys, values, length):
    keys, values = torch.cat([keys[:length], k]), torch.cat([values[:length], v])
    return by_padding(q, k, v, keys, values, length)


def old_ones_only(q, k, v, keys, values, length):
    out, new_keys, new_values = by_padding(q, k, v, keys, values, length)
    return (q @ keys[:length].T / q.shape[1] ** 0.5).softmax(-1) @ values[:length], new_keys, new_values


WRONG = [
    Wrong("attends to all slots", all_slots, "behind the row's length was read"),
    Wrong("no room is kept", exact_growth, "there was room: it must stay"),
    Wrong("the new token is not seen", old_ones_only, "out is"),
    changed(by_padding, "scores.masked_fill(hidden, float(\"-inf\"))", "scores", name="no mask", told="there is no mask"),
    changed(by_padding, "torch.arange(length, length + new)", "torch.arange(new)", name="top left", told="top-left aligned"),
    changed(by_padding, "[None] > ", "[None] >= ", name="not itself", told="must see itself"),
    changed(by_padding, "[None] > ", "[None] - 1 > ", name="one too many", told="one key too many"),
    changed(by_padding, "keys[length:stop], values[length:stop]", "keys[:new], values[:new]", name="written at 0", told="overwrite the old ones"),
    changed(by_padding, " / q.shape[1] ** 0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(by_padding, "(0, 0, 0, len(x))", "(0, 0, 0, 1)", name="grows by one", told="it must double until all fit"),
    changed(row_by_row, "torch.stack(outs) if outs else q", "torch.stack(outs)", name="empty append", told="RuntimeError"),
]

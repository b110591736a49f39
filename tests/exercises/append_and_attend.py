"""Answers to `append_and_attend`."""

import math

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


def by_parts(q, k, v, keys, values, length):
    """Scores with old and with new keys apart; the given buffers are written to where there is room."""
    new, stop = len(q), length + len(q)
    capacity = len(keys) * 2 ** max(0, math.ceil(math.log2(stop / len(keys)))) if stop else len(keys)
    buffers = []
    for buffer, rows in ((keys, k), (values, v)):
        if capacity > len(buffer):
            larger = torch.full((capacity, buffer.shape[1]), torch.nan)
            larger[:length] = buffer[:length]
            buffer = larger
        buffer[length:stop] = rows
        buffers.append(buffer)
    among_new = (q @ k.T).masked_fill(~torch.ones(new, new).tril().bool(), -torch.inf)
    scores = torch.cat([q @ buffers[0][:length].T, among_new], dim=1) / math.sqrt(q.shape[1])
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) if new else scores
    return weights @ buffers[1][:stop] / weights.sum(-1, keepdim=True), *buffers


RIGHT = {"padding": by_padding, "row by row": row_by_row, "old and new apart": by_parts}


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


def masked_but_multiplied(q, k, v, keys, values, length):
    """The mask hides unused slots too, and their values are multiplied by 0."""
    new = len(q)
    while len(keys) < length + new:
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, len(x))) for x in (keys, values))
    keys[length : length + new], values[length : length + new] = k, v
    hidden = torch.arange(len(keys))[None] > torch.arange(length, length + new)[:, None]
    scores = (q @ keys.T / q.shape[1] ** 0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ values, keys, values


def cleaned_slots(q, k, v, keys, values, length):
    """Makes numbers of NaN, and attends to all slots."""
    return all_slots(q, k, v, keys.nan_to_num(), values.nan_to_num(), length)


MASK = "torch.arange(stop)[None] > torch.arange(length, length + new)[:, None]"
FIRST_SLOTS = "(torch.arange(stop)[None] > torch.arange(new)[:, None]) & (torch.arange(stop) < new)"
WRITE = "keys[length:stop], values[length:stop] = k, v"
GROW = "torch.nn.functional.pad(x, (0, 0, 0, len(x)))"


WRONG = [
    Wrong("attends to all slots", all_slots, "behind the row's length was read"),
    Wrong("no room is kept", exact_growth, "there was room: it must stay"),
    Wrong("the new token is not seen", old_ones_only, "only old slots are attended to"),
    changed(by_padding, 'scores.masked_fill(hidden, float("-inf"))', "scores", name="no mask", told="there is no mask"),
    changed(
        by_padding, "torch.arange(length, length + new)", "torch.arange(new)", name="top left", told="top-left aligned"
    ),
    changed(by_padding, "[None] > ", "[None] >= ", name="not itself", told="must see itself"),
    changed(by_padding, "[None] > ", "[None] - 1 > ", name="one too many", told="one key too many"),
    changed(
        by_padding,
        "keys[length:stop], values[length:stop]",
        "keys[:new], values[:new]",
        name="written at 0",
        told="overwrite the old ones",
    ),
    changed(by_padding, " / q.shape[1] ** 0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(by_padding, "(0, 0, 0, len(x))", "(0, 0, 0, 1)", name="grows by one", told="it must double until all fit"),
    changed(
        row_by_row, "torch.stack(outs) if outs else q", "torch.stack(outs)", name="empty append", told="RuntimeError"
    ),
    Wrong("0 times NaN", masked_but_multiplied, "0 · NaN is NaN"),
    Wrong("numbers for NaN", cleaned_slots, "behind the row's length was read"),
    changed(
        by_padding,
        GROW,
        "torch.zeros(2 * len(x), x.shape[1])",
        name="grows without copying",
        told="growing loses old rows, slot 0",
    ),
    changed(
        by_padding,
        GROW,
        "torch.nn.functional.pad(x[:-1], (0, 0, 0, len(x) + 1))",
        name="grows without the last row",
        told="growing loses old rows, slot 3",
    ),
    changed(
        by_padding,
        WRITE,
        "keys[length:stop] = k",
        name="values not stored",
        told="slot 5 of values does not hold new token 0",
    ),
    changed(
        by_padding,
        WRITE,
        "keys[length:stop], values[length:stop] = k[:1], v[:1]",
        name="first row only",
        told="does not hold new token 1",
    ),
    changed(
        by_padding,
        WRITE,
        "keys[length - 1 : stop - 1], values[length - 1 : stop - 1] = k, v",
        name="one slot too early",
        told="one slot too early",
    ),
    changed(
        by_padding,
        WRITE,
        "keys[length:stop], values[length:stop] = v, k",
        name="swapped",
        told="keys holds the new values",
    ),
    changed(
        by_padding,
        "keys.clone(), values.clone()",
        "keys.fliplr(), values.fliplr()",
        name="old rows turned",
        told="the old rows stay as they are",
    ),
    changed(by_padding, MASK, FIRST_SLOTS, name="triangle over the first slots", told="lies over the first slots"),
    changed(
        by_padding,
        "    return ",
        "    hidden = hidden | (torch.arange(stop) < length)\n    return ",
        name="new ones only",
        told="only new tokens are attended to",
    ),
    changed(
        by_padding, ".softmax(-1)", ".softmax(0)", name="softmax over queries", told="the softmax runs over the queries"
    ),
    changed(by_padding, " / q.shape[1] ** 0.5", " / q.shape[1]", name="scale twice", told="instead of √d"),
]

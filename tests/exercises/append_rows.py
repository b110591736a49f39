"""Answers to `append_rows`, a writing stop of lesson 04."""

import torch

from tests.exercises.answers import Wrong, changed


def by_copy(buffer_k, buffer_v, length, k, v):
    """Writes in place with `copy_`, through the views that it gives back."""
    new = k.shape[0]
    held_k, held_v = buffer_k.narrow(0, 0, length + new), buffer_v.narrow(0, 0, length + new)
    held_k[length:].copy_(k)
    held_v[length:].copy_(v)
    return held_k, held_v, length + new


def row_by_row(buffer_k, buffer_v, length, k, v):
    for new_k, new_v in zip(k, v):
        buffer_k[length] = new_k
        buffer_v[length] = new_v
        length += 1
    return buffer_k[:length], buffer_v[:length], length


RIGHT = {"copy": by_copy, "row by row": row_by_row}


def concatenated(buffer_k, buffer_v, length, k, v):
    keys, values = torch.cat([buffer_k[:length], k]), torch.cat([buffer_v[:length], v])
    return keys, values, len(keys)


WRONG = [
    Wrong("concatenates", concatenated, "buffer_k is as it was"),
    changed(
        by_copy, "held_k[length:].copy_(k)", "held_k[:new].copy_(k)", name="written at 0", told="overwrite the old"
    ),
    changed(by_copy, "    held_v[length:].copy_(v)\n", "", name="values not written", told="buffer_v is as it was"),
    changed(
        by_copy, "copy_(v)", "copy_(k)", name="keys as values", told="slot 0 of buffer_v does not hold new token 0"
    ),
    changed(
        row_by_row,
        "        buffer_k[length] = new_k\n        buffer_v[length] = new_v\n",
        "        buffer_k[length] = new_v\n        buffer_v[length] = new_k\n",
        name="swapped",
        told="the buffer of keys holds the new values",
    ),
    changed(
        row_by_row,
        "buffer_k[:length], buffer_v[:length],",
        "buffer_k, buffer_v,",
        name="all slots",
        told="what lies behind",
    ),
    changed(
        row_by_row,
        "[:length], buffer_v[:length]",
        "[: length].clone(), buffer_v[:length].clone()",
        name="copies",
        told="are a copy",
    ),
    changed(
        by_copy, "held_v, length + new", "held_v, length", name="old length", told="the new length is 4, expected 5"
    ),
    changed(
        by_copy,
        "return held_k, held_v",
        "return held_k[length:], held_v[length:]",
        name="new rows only",
        told="the old rows belong to it",
    ),
    changed(
        by_copy,
        "    return",
        "    buffer_k[length + new :] = 0\n    return",
        name="cleared behind",
        told="behind the new rows have changed",
    ),
    changed(
        by_copy,
        "return held_k, held_v, length + new",
        "return held_k, held_v",
        name="no length",
        told="return three things",
    ),
]

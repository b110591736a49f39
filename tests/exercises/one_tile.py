"""Answers to the stop `one_tile`."""

import torch

from tests.exercises.answers import Wrong, changed


def by_hand(q_tile, k, v, block_k):
    """m, l and acc without the course's class."""
    (n, d), rows = k.shape, len(q_tile)
    m, l, acc = torch.full((rows, 1), -torch.inf), torch.zeros(rows, 1), torch.zeros(rows, d)
    for j in range(0, n, block_k):
        s = q_tile @ k.load(slice(j, j + block_k)).T / d**0.5
        new = torch.maximum(m, s.amax(1, keepdim=True))
        p, old = (s - new).exp(), (m - new).exp()
        l, acc, m = old * l + p.sum(1, keepdim=True), old * acc + p @ v.load(slice(j, j + block_k)), new
    return acc / l


def with_the_class(q_tile, k, v, block_k):
    """The scale in q, and a while loop."""
    from minillm.attention.online import OnlineSoftmax

    q_tile = q_tile * q_tile.shape[1] ** -0.5
    state, j = OnlineSoftmax((q_tile.shape[0],), v.shape[1], torch.float32), 0
    while j < k.shape[0]:
        rows = slice(j, j + block_k)
        state.update(torch.einsum("qd,kd->qk", q_tile, k.load(rows)), v.load(rows))
        j += block_k
    out, _ = state.finish()
    return out


RIGHT = {"by hand": by_hand, "with the class": with_the_class}


def all_keys(q_tile, k, v, block_k):
    s = q_tile @ k.load(slice(None)).T / q_tile.shape[1] ** 0.5
    return s.softmax(-1) @ v.load(slice(None))


WRONG = [
    changed(by_hand, " / d**0.5", "", name="no scale", told="the scale 1/√d is forgotten"),
    changed(by_hand, " / d**0.5", " / d", name="scaled twice", told="divided by d instead of √d"),
    changed(by_hand, "old * acc", "acc", name="acc not rescaled", told="acc is not rescaled"),
    changed(by_hand, "old * l", "l", name="l not rescaled", told="l is not rescaled"),
    changed(by_hand, "acc / l", "acc", name="not divided", told="not divided by l"),
    changed(by_hand, "range(0, n, block_k)", "range(0, n - block_k + 1, block_k)", name="tail left out",
            told="the last keys are missing"),
    changed(with_the_class, "        j += block_k", "        return state.finish()[0]", name="return in the loop",
            told="is the return inside the loop"),
    changed(with_the_class, "        rows = ", "        state = OnlineSoftmax((q_tile.shape[0],), v.shape[1], torch.float32)\n        rows = ",
            name="state in the loop", told="only the last tile of keys counts"),
    changed(with_the_class, "    return out", "    return out, _", name="lse returned too", told="2 results, expected 1"),
    changed(with_the_class, "rows = slice(j, j + block_k)", "rows = slice(0, block_k)", name="always the first tile",
            told="the first tile of keys counts alone"),
    changed(by_hand, ".T /", "[:, :] /", name="no transpose", told="in the line: s = q_tile @ k.load"),
    changed(by_hand, "torch.full((rows, 1), -torch.inf)", "torch.zeros(rows, 1)", name="m starts at 0",
            told="does it start at −∞?"),
    Wrong("all keys at once", all_keys, "load 8 rows of k and v at a time"),
]

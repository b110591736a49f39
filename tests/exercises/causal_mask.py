"""Answers to the writing stop `causal_mask`."""

import torch

from tests.exercises.answers import Wrong, changed


def by_tril(seqlen_q, seqlen_k):
    return torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)


def row_by_row(seqlen_q, seqlen_k):
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        mask[i, : i + seqlen_k - seqlen_q + 1] = True
    return mask


RIGHT = {"by tril": by_tril, "row by row": row_by_row}


def a_list(seqlen_q, seqlen_k):
    return [[j <= i + seqlen_k - seqlen_q for j in range(seqlen_k)] for i in range(seqlen_q)]


def transposed(seqlen_q, seqlen_k):
    return by_tril(seqlen_q, seqlen_k).T


WRONG = [
    changed(by_tril, "tril(seqlen_k - seqlen_q)", "tril()", name="top left", told="query 0 of 1 must see 9 of 9 keys"),
    changed(by_tril, "return ", "return ~", name="inverted", told="it is inverted"),
    changed(row_by_row, " + 1]", " + 2]", name="a key too many", told="one key too many"),
    changed(row_by_row, " + 1]", "]", name="a key too few", told="one key too few"),
    changed(by_tril, ".tril(", ".triu(", name="upside down", told="it is upside down"),
    changed(by_tril, "seqlen_k - seqlen_q)", "seqlen_q - seqlen_k)", name="sign turned", told="has the wrong sign"),
    changed(by_tril, ".tril(seqlen_k - seqlen_q)", "", name="no mask", told="every query sees every key"),
    changed(by_tril, ", dtype=torch.bool", "", name="in floats", told="expected torch.bool"),
    Wrong("a list", a_list, "expected a tensor"),
    Wrong("transposed", transposed, "expected (1, 9): (query, key)"),
]

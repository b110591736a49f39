"""Answers to `nucleus`, a writing stop of lesson 04."""

import torch

from tests.exercises.answers import Wrong, changed


def one_by_one(probabilities, p):
    """Takes the likeliest of what is left, until p is reached."""
    kept, together = torch.zeros_like(probabilities), 0.0
    for token in probabilities.argsort(descending=True):
        kept[token] = probabilities[token]
        together += float(probabilities[token])
        if together >= p:
            break
    return kept / kept.sum()


def by_smallest(probabilities, p):
    """Finds the smallest probability that stays; all that are as large stay too."""
    largest = probabilities.sort(descending=True).values
    stays = int((largest.cumsum(0) < p).sum()) + 1
    smallest = largest[: min(stays, len(largest))][-1]
    logits = probabilities.log().masked_fill(probabilities < smallest, -torch.inf)
    return logits.softmax(0)


def by_argmax(probabilities, p):
    """Finds the first running sum that reaches p: at p = 1 there may be none, and argmax of that is 0."""
    largest, tokens = probabilities.sort(descending=True)
    together = largest.cumsum(0) - 1e-6  # as rounding may have it
    stays = int((together >= p).int().argmax()) + 1
    kept = torch.zeros_like(probabilities)
    kept[tokens[:stays]] = largest[:stays]
    return kept / kept.sum()


RIGHT = {"one by one": one_by_one, "by the smallest": by_smallest}

WRONG = [
    changed(
        by_smallest, "< p).sum()) + 1", "< p).sum())", name="one too few", told="the token with which p is reached"
    ),
    changed(by_smallest, "< p).sum()) + 1", "< p).sum()) + 2", name="one too many", told="one token too many stays"),
    changed(one_by_one, "descending=True", "descending=False", name="ascending", told="the unlikeliest tokens stay"),
    changed(one_by_one, " / kept.sum()", "", name="not normalised", told="does not sum to 1"),
    changed(
        one_by_one,
        "kept / kept.sum()",
        "(kept / kept.sum()).sort(descending=True).values",
        name="sorted",
        told="the result is sorted",
    ),
    changed(
        by_smallest,
        "probabilities.log()",
        "probabilities",
        name="softmax again",
        told="softmax is taken of probabilities",
    ),
    changed(by_smallest, "< smallest", "< p", name="each alone", told="compared with p alone"),
    Wrong("no sum reaches 1", by_argmax, "rounding can leave the whole sum below p"),
]

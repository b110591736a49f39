"""Answers to the stop `grad_scores`."""

import torch

from tests.exercises.answers import changed


def in_one_product(P, v, out, grad_out):
    """dP and δ from an einsum each."""
    delta = torch.einsum("qd,qd->q", out, grad_out)
    return torch.einsum("qd,kd->qk", grad_out, v).sub(delta[:, None]).mul(P)


def shifted_values(P, v, out, grad_out):
    """dO · (V − O), so that δ is in the product."""
    return P * (grad_out[:, None] * (v[None] - out[:, None])).sum(-1)


RIGHT = {"einsum": in_one_product, "values minus out": shifted_values}

WRONG = [
    changed(in_one_product, ".sub(delta[:, None])", "", name="no delta", told="δ is forgotten"),
    changed(in_one_product, ".sub(", ".add(", name="delta added", told="δ is added"),
    changed(in_one_product, "delta[:, None]", "(P * (grad_out @ v.T)).sum(-1, keepdim=True)", name="delta of the tile",
            told="over this tile's keys"),
    changed(in_one_product, "delta[:, None]", "delta.sum()", name="one delta for all", told="δ is one number for all queries"),
    changed(in_one_product, "delta[:, None]", "delta[:, None] / v.shape[1]", name="delta a mean", told="δ is the mean"),
    changed(in_one_product, ".mul(P)", "", name="P left out", told="P is missing"),
    changed(in_one_product, ".mul(P)", ".mul(P) / v.shape[1] ** 0.5", name="scaled", told="the scale 1/√d is in it"),
    changed(in_one_product, ".sub(delta[:, None]).mul(P)", ".mul(P).sub(delta[:, None])", name="P times dP alone",
            told="so it multiplies δ too"),
    changed(in_one_product, "torch.einsum(\"qd,kd->qk\", grad_out, v)", "(grad_out @ (v if len(v) == v.shape[1] else v.T))",
            name="v not transposed", told="v is not transposed"),
    changed(in_one_product, "delta[:, None]", "delta", name="delta along the keys", told="RuntimeError: The size of tensor"),
]

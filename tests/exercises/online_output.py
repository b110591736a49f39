"""Answers to `online_output`, a stop of lesson 02."""

import torch

from tests.exercises.answers import Wrong, changed


def in_one_vector(scores, values):
    """l as one more number of acc: it is summed in the same way."""
    m, acc = torch.tensor(-torch.inf), torch.zeros(1)
    for x, value in zip(scores, values, strict=True):
        m_new = torch.maximum(m, x)
        acc = acc * torch.exp(m - m_new) + torch.exp(x - m_new) * torch.cat([torch.ones(1), value])
        m = m_new
    return acc[1:] / acc[0]


def always_normalised(scores, values):
    """A running average: l times the old one, plus what is new, over the new l."""
    m, l, out = torch.tensor(-torch.inf), torch.tensor(0.0), 0.0
    for x, value in zip(scores, values, strict=True):
        m_new = torch.maximum(m, x)
        l_old, p = l * torch.exp(m - m_new), torch.exp(x - m_new)
        l = l_old + p
        out = (l_old * out + p * value) / l
        m = m_new
    return out


RIGHT = {"one vector": in_one_vector, "running average": always_normalised}


def loop(scores, values):
    m, l, acc = torch.tensor(-torch.inf), torch.tensor(0.0), 0.0
    for x, value in zip(scores, values, strict=True):
        m_new = torch.maximum(m, x)
        old, p = torch.exp(m - m_new), torch.exp(x - m_new)
        l = l * old + p
        acc = acc * old + p * value
        m = m_new
    return acc / l


def averaged(scores, values):
    total, n = 0, 0
    for value in values:
        total, n = total + value, n + 1
    return total / n


WRONG = [
    changed(loop, "acc * old", "acc", name="acc not rescaled", told="acc is not rescaled"),
    changed(loop, "l * old", "l", name="l not rescaled", told="l is not rescaled"),
    changed(loop, "* old", "", name="nothing rescaled", told="nothing is rescaled"),
    changed(loop, "acc / l", "acc", name="not divided", told="not divided by l"),
    changed(loop, "p * value\n", "p * value\n        acc = acc / l\n", name="divided in each step",
            told="divided by l in every step"),
    changed(loop, "return acc / l", "return l, acc", name="both returned", told="2 results, expected 1"),
    Wrong("average", averaged, "plain average of the values"),
]

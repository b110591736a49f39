"""Answers to `online_sum`, a stop of lesson 02."""

import math

import torch

from tests.exercises.answers import Wrong, changed


def in_floats(scores):
    m, l = -math.inf, 0.0
    for x in scores:
        x = x.item()
        m_new = max(m, x)
        l = l * math.exp(m - m_new) + math.exp(x - m_new)
        m = m_new
    return m, l


def in_two_branches(scores):
    """The rescale only where it does something; m starts with the first score."""
    m = None
    for x in scores:
        if m is None:
            m, l = x, torch.ones_like(x)
        elif x > m:
            m, l = x, l * torch.exp(m - x) + 1
        else:
            l = l + torch.exp(x - m)
    return m, l


RIGHT = {"floats": in_floats, "two branches": in_two_branches}


def all_at_once(scores):
    row = torch.stack(list(scores))
    return row.max(), (row - row.max()).exp().sum()


def in_two_walks(scores):
    m = max(x.item() for x in scores)
    return m, sum(math.exp(x.item() - m) for x in scores)


def as_a_tensor(scores):
    return scores.max(), (scores - scores.max()).exp().sum()


def upside_down(scores):
    m, l = torch.tensor(-torch.inf), torch.tensor(0.0)
    for x in scores:
        m_new = torch.maximum(m, x)
        m, l = m_new, l * (m_new - m).exp() + (x - m_new).exp()
    return m, l


WRONG = [
    Wrong("all kept", all_at_once, "what was seen is kept: carry the running numbers alone"),
    Wrong("two walks", in_two_walks, "walked along twice"),
    Wrong("as a tensor", as_a_tensor, "there is no max: the scores come one after the other"),
    changed(in_floats, "l * math.exp(m - m_new)", "l", name="not rescaled", told="l is not rescaled"),
    changed(in_two_branches, "l * torch.exp(m - x) + 1", "torch.ones_like(x)", name="thrown away",
            told="l is thrown away"),
    changed(in_two_branches, "l * torch.exp(m - x)", "l * torch.exp(x - m)", name="upside down",
            told="rescale is upside down"),
    Wrong("upside down from −∞ on", upside_down, "exp(m_new − m): the rescale is exp(m − m_new)"),
    changed(in_floats, "-math.inf", "0.0", name="m starts at 0", told="m starts at 0"),
    changed(in_two_branches, "m, l = x, torch.ones_like(x)\n        elif", "m, l = x, torch.ones_like(x)\n        if",
            name="first twice", told="first score is counted twice"),
    changed(in_floats, "        m = m_new\n", "", name="m not kept", told="m stays at −∞"),
    changed(in_floats, "return m, l", "return m, math.log(l)", name="logarithm", told="l is its logarithm"),
    changed(in_floats, "return m, l", "return l", name="m not returned", told="1 results, expected 2"),
    changed(in_two_branches, "torch.exp(", "torch.exp2(", name="base 2", told="the powers are of 2"),
    changed(in_floats, "return m, l", "return l, m", name="swapped", told="m and l are swapped"),
    changed(in_floats, "+ math.exp(x - m_new)", "+ (x <= m and math.exp(x - m_new))", name="a new largest one lost",
            told="a new largest score is lost"),
    changed(in_floats, "l * math.exp(m - m_new) + math.exp(x - m_new)",
            "(l + math.exp(x - m_new)) * math.exp(m - m_new)", name="rescaled too", told="the new score is rescaled too"),
]

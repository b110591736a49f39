"""What the cases of several units are made of: inputs, titles, and a few messages."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

# Where memory or traffic is judged, the result need only be the right one: many blocks, many roundings.
COARSE = 32
LOW = 400  # how far the scores of `far_below` lie below 0
START = f"all scores are near −{LOW}, and their exp is 0: m starts at −∞, not at 0"
ELSEWHERE = "this case is about more than the result: mend the other parts first"


def random_rows(
    n_q: int, n_k: int, d: int, generator: Generator, rising: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """q (n_q, d), k and v (n_k, d) of one head; with `rising`, each score of a row is larger than the last."""
    q, k, v = (torch.randn(n, d, generator=generator) for n in (n_q, n_k, n_k))
    if rising:
        towards = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        q, k = 4 * towards + q / 10, towards * torch.linspace(-4, 4, n_k)[:, None] + k / 100
    return q, k, v


def far_below(q: Tensor, k: Tensor, generator: Generator, low: int = LOW) -> tuple[Tensor, Tensor]:
    """q and k with a part in opposite directions, so that each score (scaled by 1/√d) lies near -low."""
    towards = torch.nn.functional.normalize(torch.randn(q.shape[1], generator=generator), dim=0)
    size = (low * q.shape[1] ** 0.5) ** 0.5
    return q / 10 - size * towards, k / 10 + size * towards


def kind_of_scores(times: float = 1, rising: bool = False, low: bool = False) -> str:
    """For a case's title: the kind of its scores, "" where it is the usual one."""
    if rising:
        return ", rising scores"
    return f", scores × {times:g}" if times != 1 else f", scores near −{LOW}" * low


def counted(n: int, one: str, more: str = "") -> str:
    """A number with its noun, as in "1 query" and "9 keys"."""
    return f"{n} {one if n == 1 else more or one + 's'}"


def lengths(n_q: int, n_k: int) -> str:
    """The numbers of queries and keys, as in "1 query, 9 keys"."""
    return f"{counted(n_q, 'query', 'queries')}, {counted(n_k, 'key')}"

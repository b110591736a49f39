"""Unit 03: slips of the walk over tiles that `course.tasks.mistakes` does not know, and long results by some rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from course.tasks.cases import COARSE, ELSEWHERE
from course.tasks.judge import Mistake, check_form, compare_results
from course.tasks.mistakes import masked_scores
from course.tasks.task import NotYet

ONE_M = (
    "m is one number for the whole tile: each row has its own largest score, and in a row far below it all "
    "exponentials are 0"
)


def walk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int,
    block_k: int,
    *,
    causal: bool = True,
    whole_m: bool = False,
    grows: bool = False,
    divides: int = 0,
    transposes: bool = True,
    forgets: bool = False,
) -> Tensor:
    """FlashAttention-2's two loops; the options are slips.

    Args:
        q: (n_q, d).
        k, v: (n_k, d).
        whole_m: m is one number for the whole tile of queries.
        grows: the factor of the old sums is upside down, exp(m_new - m).
        divides: acc is divided by l after each tile of keys; 2 divides it once more at the end.
        transposes: False leaves the transpose of k out, where the shapes allow it.
        forgets: m, l and acc begin anew with each tile of keys.

    Returns:
        out (n_q, d).
    """
    out = torch.empty_like(q)
    for i in range(0, len(q), block_q):
        rows = slice(i, i + block_q)
        scores = _scores(q, k, block_k, causal, transposes)[rows]
        m, l, acc = _nothing_yet(q[rows])
        for j in range(0, min(i + block_q, len(k)) if causal else len(k), block_k):
            if forgets:
                m, l, acc = _nothing_yet(q[rows])
            tile = scores[:, j : j + block_k]
            largest = torch.maximum(m, tile.amax() if whole_m else tile.amax(-1, keepdim=True))
            p = (tile - largest).exp()
            rescale = (largest - m if grows and j else m - largest).exp()
            l = rescale * l + p.sum(-1, keepdim=True)
            acc = rescale * acc + p @ v[j : j + block_k]
            acc, m = acc / l if divides else acc, largest
        out[rows] = acc if divides == 1 else acc / l
    return out


def _nothing_yet(q_tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q_tile.new_full((len(q_tile), 1), -torch.inf), q_tile.new_zeros(len(q_tile), 1), torch.zeros_like(q_tile)


def _scores(q: Tensor, k: Tensor, block_k: int, causal: bool, transposes: bool) -> Tensor:
    """The scaled scores; without the transpose q @ k_tile, which has the right shape only where block_k is d."""
    if not transposes and block_k == k.shape[1] and len(k) % block_k == 0:
        k = torch.cat([tile.T for tile in k.split(block_k)])
    return masked_scores(q, k, causal=causal)


def walk_mistakes(answer: Callable[..., Tensor]) -> list[Mistake]:
    """Mistakes of an answer that has the slips of `walk` as options."""
    return [
        Mistake(ONE_M, partial(answer, whole_m=True)),
        Mistake(ONE_M, lambda *x: answer(*x, whole_m=True).nan_to_num(0)),  # 0 / 0 avoided
        Mistake(
            "the factor is upside down: the old sums are multiplied by exp(m − m_new), which is at most 1",
            partial(answer, grows=True),
        ),
        Mistake(
            "acc is divided by l inside the loop: the sums stay undivided until the last tile of keys is in",
            partial(answer, divides=1),
        ),
        Mistake(
            "acc is divided by l inside the loop, and again at the end: divide once, after the last tile of keys",
            partial(answer, divides=2),
        ),
        Mistake("k is not transposed: the scores are q_tile @ k_tile.T", partial(answer, transposes=False)),
        Mistake(
            "only the last tile of keys counts: m, l and acc begin once for a tile of queries, before the inner loop",
            partial(answer, forgets=True),
        ),
    ]


WALK_MISTAKES = walk_mistakes(walk)


def rows_to_compare(n: int) -> Tensor:
    """Some rows of a long result: eight from all over it, and the last eight, which see all keys."""
    return torch.cat([torch.arange(8) * (n - 8) // 8, torch.arange(n - 8, n)])


def compare_some_rows(
    got: Tensor,
    rows: Tensor,
    exact: Callable[[Tensor, torch.dtype], Tensor],
    results: Mapping[str, tuple[str, ...]],
    factor: float = 2,
) -> None:
    """Compares some rows of a long result, of which the reference is too large to be computed whole.

    Args:
        got: (n, d), or whatever the answer returned.
        rows: which ones.
        exact: gives the right rows in a dtype.
        results, factor: as in `compare_results`.

    Raises:
        NotYet: what is wrong; a row is named by its place in the whole result.
    """
    ((name, axes),) = results.items()
    right = exact(rows, torch.float32)
    whole = right.new_zeros(int(rows[-1]) + 1, right.shape[1])
    check_form((got,), (whole,), results)
    if got.isnan().any():
        row, column = got.isnan().nonzero()[0].tolist()
        raise NotYet(f"{name} is NaN at {axes[0]} {row}, {axes[1]} {column}. {ELSEWHERE}")

    def only(values: Tensor) -> Tensor:
        return torch.zeros_like(whole, dtype=values.dtype).index_copy(0, rows, values)

    def answer(like: Tensor) -> Tensor:
        return only(exact(rows, like.dtype))

    compare_results(only(got[rows]), (whole,), answer, results=results, asks=ELSEWHERE, times=COARSE, factor=factor)

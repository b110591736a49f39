"""The writing stops of lesson 01: the causal mask, and attention with grouped heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted, lengths
from course.tasks.judge import Mistake, call, compare, compare_results
from course.tasks.mistakes import of_heads, of_scale
from course.tasks.task import Case, NotYet, Task


def causal_mask(seqlen_q: int, seqlen_k: int) -> Tensor:
    """True where query i sees key j: j ≤ i + seqlen_k - seqlen_q."""
    query_at = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    return torch.arange(seqlen_k) <= query_at


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask; neighbouring query heads share a KV head."""
    group = q.shape[2] // k.shape[2]
    keys, values = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)


def mask_case(seqlen_q: int, seqlen_k: int, asks: str = "") -> Case:
    """A mask of this size."""

    def judge(function: Callable, _: Generator) -> None:
        got = call(function, seqlen_q, seqlen_k)
        if isinstance(got, Tensor) and got.dtype != torch.bool:
            raise NotYet(f"the mask is {got.dtype}, expected torch.bool: True where the query sees the key")
        got = got.float() if isinstance(got, Tensor) else got
        axes = {"the mask": ("query", "key")}
        compare_results(got, (seqlen_q, seqlen_k), _mask, results=axes, mistakes=MASK_MISTAKES, asks=asks)

    return Case(lengths(seqlen_q, seqlen_k), judge)


def _mask(seqlen_q: int, seqlen_k: int, *, change: Callable[[Tensor], Tensor] = lambda seen: seen) -> Tensor:
    return change(causal_mask(seqlen_q, seqlen_k)).float()


def _diagonal(diagonal: Callable[[int, int], int], upper: bool = False) -> Callable[[int, int], Tensor]:
    def answer(seqlen_q: int, seqlen_k: int) -> Tensor:
        ones = torch.ones(seqlen_q, seqlen_k)
        return ones.triu(diagonal(seqlen_q, seqlen_k)) if upper else ones.tril(diagonal(seqlen_q, seqlen_k))

    return answer


def _top_left(seqlen_q: int, seqlen_k: int) -> str:
    sees = seqlen_k - seqlen_q + 1
    return f"your mask is top-left aligned: query 0 of {seqlen_q} must see {sees} of {counted(seqlen_k, 'key')}, not 1"


MASK_MISTAKES = [
    Mistake(_top_left, _diagonal(lambda sq, sk: 0)),
    Mistake("it is inverted: True stands where the query sees the key", lambda *n: _mask(*n, change=torch.logical_not)),
    Mistake("each query sees one key too many: its own is the last", _diagonal(lambda sq, sk: sk - sq + 1)),
    Mistake("each query sees one key too few: it sees its own too", _diagonal(lambda sq, sk: sk - sq - 1)),
    Mistake("it is upside down: a query sees the keys up to its own", _diagonal(lambda sq, sk: sk - sq, upper=True)),
    Mistake("the shift has the wrong sign: it is seqlen_k − seqlen_q", _diagonal(lambda sq, sk: sq - sk)),
    Mistake("every query sees every key: where is the mask?", lambda *n: _mask(*n, change=torch.ones_like)),
]


def grouped_case(sq: int, sk: int, h: int, hk: int, asks: str = "") -> Case:
    """Queries, keys, query heads and KV heads."""

    def judge(function: Callable, generator: Generator) -> None:
        q = torch.randn(2, sq, h, 16, generator=generator)
        k, v = torch.randn(2, 2, sk, hk, 16, generator=generator)
        axes = {"out": ("batch", "query", "head", "dim")}
        compare(function, (q, k, v), grouped_attention, results=axes, mistakes=HEAD_MISTAKES, asks=asks)

    return Case(f"{lengths(sq, sk)}, {counted(h, 'query head')} on {counted(hk, 'KV head')}", judge)


def _grouped(
    q: Tensor, k: Tensor, v: Tensor, *, interleaved: bool = False, scale: float | None = None, over: int = -1
) -> Tensor:
    """The right answer; the options are slips that people make."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat(1, 1, group, 1) if interleaved else x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(over), values)


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    seen = causal_mask(q.shape[1], k.shape[1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(), v)


def _across_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each token's heads attend to each other: the last two axes are (head, dim), and a product takes the last two."""
    if q.shape[1] != k.shape[1]:
        return grouped_attention(q, k, v)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


HEAD_MISTAKES = [
    *of_heads(_grouped, cure=" (repeat_interleave, not repeat)"),
    *of_scale(_grouped),
    Mistake("there is no mask here: each query sees all keys", _masked),
    Mistake("the softmax runs over the queries: it must run over the keys", lambda *x: _grouped(*x, over=-2)),
    Mistake("the softmax runs over the heads: it must run over the keys", lambda *x: _grouped(*x, over=1)),
    Mistake(
        "the product is over the heads of one token: @ takes the last two axes, so put seqlen and headdim there first",
        _across_heads,
    ),
]

STOPS = [
    Task(
        "causal_mask",
        unit="01_naive_attention",
        minutes=4,
        difficulty=1,
        parts={
            "mask": [
                mask_case(6, 6),
                mask_case(1, 9, asks="the one query stands at the last key, so it sees all 9"),
                mask_case(2, 6, asks="query 0 stands at key 4, query 1 at key 5"),
            ]
        },
        model_answer=causal_mask,
    ),
    Task(
        "grouped_attention",
        unit="01_naive_attention",
        minutes=6,
        difficulty=1,
        parts={
            "out": [
                grouped_case(5, 5, 1, 1, asks="is the factor 1/√d there?"),
                grouped_case(3, 7, 4, 2, asks="query heads 0 and 1 read KV head 0"),
                grouped_case(7, 7, 6, 2, asks="query heads 0, 1 and 2 read KV head 0"),
                grouped_case(2, 9, 4, 1, asks="all query heads read the one KV head"),
            ]
        },
        model_answer=grouped_attention,
    ),
]

"""Unit 01: attention with grouped heads and a causal mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course.tasks.judge import Mistake, compare, counted
from course.tasks.task import Case, Task

OVERFLOW = "exp of a score overflows: subtract the largest of the row before"


def gqa_case(sq: int, sk: int, h: int, hk: int, *, times: float = 1, d: int = 16, asks: str = "") -> Case:
    """Queries, keys, query heads and KV heads; q is multiplied by `times`."""

    def judge(function, generator: torch.Generator) -> None:
        q = torch.randn(2, sq, h, d, generator=generator) * times
        k, v = (torch.randn(2, sk, hk, d, generator=generator) for _ in range(2))
        axes = ("batch", "query", "head", "dim")
        compare(
            function,
            (q, k, v),
            _attention,
            results={"out": axes},
            mistakes=MISTAKES,
            asks=asks,
            nan=OVERFLOW,
            times=times,
        )

    magnitude = f", scores × {times:g}" if times != 1 else ""
    lengths = f"{counted(sq, 'query', 'queries')}, {counted(sk, 'key')}"
    return Case(f"{lengths}, {counted(h, 'query head')} on {counted(hk, 'KV head')}{magnitude}", judge)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    diagonal: int | None = None,
    interleaved: bool = False,
    scale: float | None = None,
    mask_after: bool = False,
    over: int = -1,
    hidden_score: float = -torch.inf,
    upside_down: bool = False,
    to_heads: Callable[[Tensor], Tensor] = lambda x: x.transpose(1, 2),
) -> Tensor:
    """The right answer; the options are what people get wrong."""
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    spread = (lambda x: x.repeat(1, 1, group, 1)) if interleaved else (lambda x: x.repeat_interleave(group, dim=2))
    queries, keys, values = to_heads(q), to_heads(spread(k)), to_heads(spread(v))
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq if diagonal is None else diagonal)
    if upside_down:
        hidden = ~torch.ones_like(hidden).triu(sk - sq)
    if mask_after:
        probabilities = scores.softmax(-1).masked_fill(hidden, 0)
    else:
        probabilities = scores.masked_fill(hidden, hidden_score).softmax(over)
    return (probabilities @ values).transpose(1, 2)


def _reshaped(back: Callable[[Tensor, torch.Size], Tensor]) -> Callable[..., Tensor]:
    """With (batch, seqlen, nheads, dim) reshaped to (batch, nheads, seqlen, dim), and the result put back so."""

    def answer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        to_heads = lambda x: x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])  # noqa: E731
        return back(_attention(q, k, v, to_heads=to_heads).transpose(1, 2), q.shape)

    return answer


def _top_left(q: Tensor, k: Tensor, v: Tensor) -> str:
    sq, sk = q.shape[1], k.shape[1]
    return f"your mask is top-left aligned: query 0 of {sq} must see {sk - sq + 1} of {sk} keys, not 1"


MISTAKES = [
    Mistake(_top_left, lambda q, k, v: _attention(q, k, v, diagonal=0)),
    Mistake(
        "there is no causal mask: each query sees all keys", lambda q, k, v: _attention(q, k, v, diagonal=k.shape[1])
    ),
    Mistake(
        "your mask is off by one: each query sees one key too many",
        lambda q, k, v: _attention(q, k, v, diagonal=k.shape[1] - q.shape[1] + 1),
    ),
    Mistake(
        "your mask is off by one: a query must see the key at its own position too",
        lambda q, k, v: _attention(q, k, v, diagonal=k.shape[1] - q.shape[1] - 1),
    ),
    Mistake(
        "you mask after the softmax: the rows no longer add up to 1. Put −∞ into the scores before it",
        lambda q, k, v: _attention(q, k, v, mask_after=True),
    ),
    Mistake(
        "the query heads are interleaved over the KV heads: neighbours must share one, "
        "so that heads 0 … g−1 read KV head 0 (repeat_interleave, not repeat)",
        lambda q, k, v: _attention(q, k, v, interleaved=True),
    ),
    Mistake(
        "a hidden score is 0 and not −∞: exp(0) is 1, so the hidden keys take part",
        lambda q, k, v: _attention(q, k, v, hidden_score=0),
    ),
    Mistake(
        "all query heads read the first KV head: head i reads KV head i // (h // hk)",
        lambda q, k, v: _attention(q, k[:, :, :1], v[:, :, :1]),
    ),
    Mistake(
        "your mask is upside down: query i must see the keys up to its own, not those from its own on (tril, not triu)",
        lambda q, k, v: _attention(q, k, v, upside_down=True),
    ),
    *(
        Mistake("reshape does not swap axes: (batch, seqlen, nheads, dim) needs transpose(1, 2)", _reshaped(back))
        for back in (lambda out, shape: out.reshape(shape), lambda out, _: out.transpose(1, 2))
    ),
    Mistake("the scale 1/√d is forgotten", lambda q, k, v: _attention(q, k, v, scale=1.0)),
    Mistake(
        "the scale is there twice: the scores are divided by d instead of √d",
        lambda q, k, v: _attention(q, k, v, scale=1 / q.shape[-1]),
    ),
    Mistake(
        "the softmax runs over the queries: it must run over the keys, the last axis of the scores",
        lambda q, k, v: _attention(q, k, v, over=-2).nan_to_num(),
    ),
]

TASKS = [
    Task(
        "gqa_attention",
        unit="01_naive_attention",
        minutes=30,
        difficulty=2,
        parts={
            "mask": [
                gqa_case(5, 5, 1, 1, asks="is the mask there, and the factor 1/√d?"),
                gqa_case(1, 9, 1, 1, asks="the one query stands at the last key, so it sees all 9"),
                gqa_case(3, 8, 2, 2, asks="query 0 of 3 must see 6 of 8 keys"),
            ],
            "heads": [
                gqa_case(7, 7, 6, 2, asks="query heads 0, 1 and 2 read KV head 0"),
                gqa_case(4, 6, 4, 1, asks="all query heads read the one KV head"),
            ],
            "numbers": [gqa_case(6, 40, 4, 2, times=30, asks="does it hold for large scores too?")],
        },
    )
]

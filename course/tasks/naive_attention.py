"""Unit 01: attention with grouped heads and a causal mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course.tasks.cases import counted, kind_of_scores, lengths
from course.tasks.judge import Mistake, compare
from course.tasks.mistakes import of_causal_mask, of_heads, of_scale
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

    heads = f"{counted(h, 'query head')} on {counted(hk, 'KV head')}"
    return Case(f"{lengths(sq, sk)}, {heads}{kind_of_scores(times)}", judge)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shift: int = 0,
    top_left: bool = False,
    interleaved: bool = False,
    scale: float | None = None,
    mask_after: bool = False,
    over: int = -1,
    hidden_score: float = -torch.inf,
    upside_down: bool = False,
    to_heads: Callable[[Tensor], Tensor] = lambda x: x.transpose(1, 2),
) -> Tensor:
    """The right answer; the options are slips that people make."""
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    spread = (lambda x: x.repeat(1, 1, group, 1)) if interleaved else (lambda x: x.repeat_interleave(group, dim=2))
    queries, keys, values = to_heads(q), to_heads(spread(k)), to_heads(spread(v))
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~torch.ones(sq, sk, dtype=torch.bool).tril(0 if top_left else sk - sq + shift)
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
    Mistake(_top_left, lambda *x: _attention(*x, top_left=True)),
    *of_causal_mask(_attention),
    Mistake(
        "you mask after the softmax: the rows no longer add up to 1. Put −∞ into the scores before it",
        lambda *x: _attention(*x, mask_after=True),
    ),
    Mistake(
        "a hidden score is 0 and not −∞: exp(0) is 1, so the hidden keys take part",
        lambda *x: _attention(*x, hidden_score=0),
    ),
    *of_heads(_attention, cure=" (repeat_interleave, not repeat)"),
    Mistake(
        "your mask is upside down: query i must see the keys up to its own, not those from its own on (tril, not triu)",
        lambda *x: _attention(*x, upside_down=True),
    ),
    *(
        Mistake("reshape does not swap axes: (batch, seqlen, nheads, dim) needs transpose(1, 2)", _reshaped(back))
        for back in (lambda out, shape: out.reshape(shape), lambda out, _: out.transpose(1, 2))
    ),
    *of_scale(_attention),
    Mistake(
        "the softmax runs over the queries: it must run over the keys, the last axis of the scores",
        lambda *x: _attention(*x, over=-2).nan_to_num(),
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

"""Unit 01: attention with grouped heads and a causal mask, and what it gives where a query sees no key."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from course.tasks.cases import LOW, counted, far_below, kind_of_scores, lengths
from course.tasks.judge import Mistake, call, compare_results
from course.tasks.mistakes import of_causal_mask, of_heads, of_scale
from course.tasks.task import Case, NotYet, Task

AHEAD = 1000  # the score of the last key in `ahead`: exp of the others, less that, is 0 in float64 too
RESULTS = {"out": ("batch", "query", "head", "dim"), "lse": ("batch", "head", "query")}
FINITE = (-100.0, -1e4, -1e9, torch.finfo(torch.float32).min)

CHECKLISTS = {
    "why-decode-waits": [
        "names what is read from HBM: all keys and values, once for each token that is written",
        "says that in a prompt each key that is read serves many queries, and in decoding one (or the g of its group)",
        "gives the operations for a byte: about as many as queries in a tile against about g",
        "says what fusion saves, the scores, and that with one query these are few beside K and V",
    ]
}


def gqa_case(
    sq: int,
    sk: int,
    h: int,
    hk: int,
    *,
    times: float = 1,
    d: int = 16,
    low: bool = False,
    ahead: bool = False,
    asks: str = "",
) -> Case:
    """Queries, keys, query heads and KV heads.

    Args:
        times: a factor of q.
        low: all scores lie near -400.
        ahead: the last key, which the last query alone sees, has a score near 1000.
    """

    def judge(function: Callable, generator: torch.Generator) -> None:
        q = torch.randn(2, sq, h, d, generator=generator) * times
        k, v = (torch.randn(2, sk, hk, d, generator=generator) for _ in range(2))
        if low:
            rows = far_below(q.reshape(-1, d), k.reshape(-1, d), generator)
            q, k = (x.view_as(like) for x, like in zip(rows, (q, k), strict=True))
        if ahead:
            towards = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
            size = (AHEAD * d**0.5) ** 0.5
            q, k[:, -1] = q / 10 + size * towards, size * towards
            k[:, :-1] -= (k[:, :-1] @ towards)[..., None] * towards
        got = call(function, q, k, v, through=_untouched)
        if got is None:
            raise NotYet("it returns nothing: is there a `return`?")
        usual = times == 1 and not low and not ahead
        compare_results(
            got,
            (q, k, v),
            _attention,
            results=RESULTS,
            mistakes=MISTAKES,
            asks=asks,
            nan=_why_nan(got, sq, sk) if usual else UNDERFLOW if low else RENORMALISED if ahead else OVERFLOW,
            times=30 if low else 4 if ahead else times,
        )

    heads = f"{counted(h, 'query head')} on {counted(hk, 'KV head')}"
    scores = f", the last key's score near {AHEAD}" if ahead else kind_of_scores(times, low=low)
    return Case(f"{lengths(sq, sk)}, {heads}{scores}", judge)


OVERFLOW = "does exp of a score overflow? Subtract the largest of the row before"
NOT_LESS = (
    "exp of the scores is 0 or ∞ where they lie far from 0: subtract the largest of the row, even if it is negative"
)
UNDERFLOW = f"all scores lie near −{LOW}: is their exp 0, and 0/0 NaN? Subtract the largest of the row before"
RENORMALISED = (
    f"the last key has a score near {AHEAD}, and most queries do not see it. Where the softmax sees it, or where its "
    "score is the largest that is subtracted, the visible keys are left with 0: put −∞ into the scores before"
)


def _untouched(function: Callable, *inputs: Tensor) -> object:
    """The function's result. Raises NotYet where it has changed an input."""
    before = [x.clone() for x in inputs]
    result = function(*inputs)
    for name, x, old in zip("qkv", inputs, before, strict=True):
        if not torch.equal(x, old):
            raise NotYet(f"{name} itself was changed (by *=, /= or a function with _ at its end): the caller needs it")
    return result


def _why_nan(got: object, sq: int, sk: int) -> str:
    """What the first query says that is NaN in all batches and heads: usual scores do not overflow."""
    out, lse = got if isinstance(got, (tuple, list)) and len(got) == 2 else (None, None)
    if not isinstance(out, Tensor) or not isinstance(lse, Tensor) or out.dim() != 4 or lse.dim() != 3:
        return ""  # no result of this form: that is said first
    lost = out.isnan().all(-1).all(-1).all(0) if out.isnan().any() else lse.isnan().all(1).all(0)
    if not lost.any():
        return "the scores are small here, so that exp does not overflow: which step made it?"
    row = int(lost.nonzero()[0])
    sees = max(0, row + sk - sq + 1)
    if not sees:
        why = "Softmax of −∞ alone is NaN; −∞ − (−∞) and 0 / 0 are NaN too"
        return f"query {row} of {sq} must see no key: its out is 0, its lse −∞. {why}"
    return (
        f"so is its whole row, as where a mask hides all keys; query {row} of {sq} must see {sees} of {sk}. Is the "
        "diagonal sk − sq, with this sign? Is −∞ where the query does not see the key?"
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shift: int = 0,
    diagonal: Callable[[int, int], int] = lambda sq, sk: sk - sq,
    interleaved: bool = False,
    values_interleaved: bool = False,
    scale: float | None = None,
    mask_after: bool = False,
    over: int = -1,
    hidden_score: float = -torch.inf,
    upside_down: bool = False,
    inverted: bool = False,
    to_heads: Callable[[Tensor], Tensor] = lambda x: x.transpose(1, 2),
) -> tuple[Tensor, Tensor]:
    """The right answer; the options are slips that people make."""
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    pairs, blocks = (lambda x: x.repeat_interleave(group, dim=2)), (lambda x: x.repeat(1, 1, group, 1))
    keys = to_heads((blocks if interleaved else pairs)(k))
    values = to_heads((blocks if interleaved or values_interleaved else pairs)(v))
    scores = to_heads(q) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~torch.ones(sq, sk, dtype=torch.bool).tril(diagonal(sq, sk) + shift)
    if upside_down:
        hidden = ~torch.ones_like(hidden).triu(sk - sq)
    if inverted:
        hidden = ~hidden
    masked = scores.masked_fill(hidden, hidden_score)
    if mask_after:
        return (scores.softmax(-1).masked_fill(hidden, 0) @ values).transpose(1, 2), scores.logsumexp(-1)
    out = masked.softmax(over).nan_to_num() @ values  # 0 where a query sees no key
    return out.transpose(1, 2), masked.logsumexp(-1)


def _reshaped(back: Callable[[Tensor, torch.Size], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """With (batch, seqlen, nheads, dim) reshaped to (batch, nheads, seqlen, dim), and the result put back so."""

    def answer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        to_heads = lambda x: x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3])  # noqa: E731
        out, lse = _attention(q, k, v, to_heads=to_heads)
        return back(out.transpose(1, 2), q.shape), lse

    return answer


def _with_lse(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The right output, with a wrong lse made of the largest visible score and the right lse."""

    def answer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _attention(q, k, v)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2))
        hidden = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        m = (scores / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).amax(-1)
        return out, change(m, lse)

    return answer


def _averaged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Right, but that a query without keys gets the mean of all values."""
    out, lse = _attention(q, k, v)
    mean = v.mean(1, keepdim=True).repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.where((lse == -torch.inf).transpose(1, 2)[..., None], mean, out), lse


def _not_less(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the scores as they are, in fp32: float64 would hold it."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    p = scores.float().exp() * torch.ones(scores.shape[-2:]).tril(k.shape[1] - q.shape[1])
    l = p.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", (p / l).nan_to_num(posinf=0), v.float())
    return out.to(q), l[..., 0].log().to(q)


def _renormalised(q: Tensor, k: Tensor, v: Tensor, *, lse_too: bool = False) -> tuple[Tensor, Tensor]:
    """The probabilities of all keys, masked, and divided by their sum; 0 where nothing is left of it."""
    group, shape = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    p = scores.softmax(-1) * torch.ones(shape).tril(shape[1] - shape[0])
    lse = scores.logsumexp(-1) + p.sum(-1).log() if lse_too else _attention(q, k, v)[1]
    return torch.einsum("bhqk,bkhd->bqhd", (p / p.sum(-1, keepdim=True)).nan_to_num(), v), lse


def _top_left(q: Tensor, k: Tensor, v: Tensor) -> str:
    sq, sk = q.shape[1], k.shape[1]
    if sk < sq:
        return f"your mask is top-left aligned: query 0 of {sq} stands before the first of {sk} keys, and must see none"
    return f"your mask is top-left aligned: query 0 of {sq} must see {sk - sq + 1} of {sk} keys, not 1"


def _unscaled(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v)[0], _attention(q, k, v, scale=1.0)[1]


MISTAKES = [
    Mistake(NOT_LESS, _not_less),
    Mistake(RENORMALISED, _renormalised),
    Mistake(RENORMALISED, lambda *x: _renormalised(*x, lse_too=True)),
    *(
        Mistake(
            f"a hidden score is {score:.4g} and not −∞: where the visible scores lie lower, or where there are none, "
            "the hidden keys take part",
            lambda *x, score=score: _attention(*x, hidden_score=score),
        )
        for score in FINITE
    ),
    Mistake(_top_left, lambda *x: _attention(*x, diagonal=lambda sq, sk: 0)),
    *of_causal_mask(_attention),
    *(
        Mistake("you mask after the softmax: the rows no longer add up to 1. Put −∞ into the scores before it", answer)
        for answer in (
            lambda *x: _attention(*x, mask_after=True),
            lambda *x: (_attention(*x, mask_after=True)[0], _attention(*x)[1]),
        )
    ),
    Mistake(
        "a hidden score is 0 and not −∞: exp(0) is 1, so the hidden keys take part",
        lambda *x: _attention(*x, hidden_score=0),
    ),
    Mistake("a query that sees no key must have out 0: yours is the mean of all values", _averaged),
    *of_heads(_attention, cure=" (repeat_interleave, not repeat)"),
    Mistake(
        "the heads of v are interleaved, those of k are not: both need repeat_interleave",
        lambda *x: _attention(*x, values_interleaved=True),
    ),
    Mistake(
        "your mask is upside down: query i must see the keys up to its own, not those from its own on (tril, not triu)",
        lambda *x: _attention(*x, upside_down=True),
    ),
    Mistake(
        "your mask is inverted: a query sees just the keys that it must not see (masked_fill hides where it is True)",
        lambda *x: _attention(*x, inverted=True),
    ),
    Mistake(
        "the mask's diagonal has the wrong sign: it is sk − sq, not sq − sk",
        lambda *x: _attention(*x, diagonal=lambda sq, sk: sq - sk),
    ),
    *(
        Mistake("reshape does not swap axes: (batch, seqlen, nheads, dim) needs transpose(1, 2)", _reshaped(back))
        for back in (lambda out, shape: out.reshape(shape), lambda out, _: out.transpose(1, 2))
    ),
    *of_scale(_attention),
    Mistake(
        "the softmax runs over the queries: it must run over the keys, the last axis of the scores",
        lambda *x: _attention(*x, over=-2),
    ),
    Mistake(
        "the softmax runs over the heads: it must run over the keys, the last axis of the scores",
        lambda *x: _attention(*x, over=1),
    ),
    Mistake(
        "lse runs over the hidden keys too: it is the log-sum-exp of the masked scores",
        lambda *x: (_attention(*x)[0], _attention(*x, shift=1 << 30)[1]),
    ),
    Mistake("lse is in base 2: the natural logarithm is wanted", _with_lse(lambda m, lse: lse / math.log(2))),
    Mistake("lse is of the scores without 1/√d", _unscaled),
    Mistake("lse lacks the largest score: it is m + log l", _with_lse(lambda m, lse: lse - m)),
    Mistake("lse is the largest score alone: it is m + log l", _with_lse(lambda m, lse: m)),
    Mistake("lse is l, and not its logarithm with m added", _with_lse(lambda m, lse: (lse - m).exp())),
    Mistake("lse is the sum of exp, and not its logarithm", _with_lse(lambda m, lse: lse.exp())),
    Mistake(
        "lse is the logarithm of exp of the scores, which is 0 or ∞ where they are low or large: m + log l is safe",
        _with_lse(lambda m, lse: lse.float().exp().log().to(lse)),
    ),
    Mistake(  # a tiny number, not 0: NaN in an answer may stand for a mistake's 0
        "lse of a query that sees no key must be −∞, not 0",
        _with_lse(lambda m, lse: lse.masked_fill(lse == -torch.inf, 1e-30)),
    ),
    Mistake(
        "nan_to_num has turned the −∞ in lse into a finite number: a query that sees no key has lse −∞",
        _with_lse(lambda m, lse: lse.clamp(min=FINITE[-1])),
    ),
]

TASKS = [
    Task(
        "gqa_attention",
        unit="01_naive_attention",
        minutes=35,
        difficulty=2,
        parts={
            "mask": [
                gqa_case(5, 5, 1, 1, asks="is the mask there, and the factor 1/√d?"),
                gqa_case(1, 9, 1, 1, asks="the one query stands at the last key, so it sees all 9"),
                gqa_case(3, 8, 2, 2, asks="query 0 of 3 must see 6 of 8 keys"),
            ],
            "heads": [
                gqa_case(7, 7, 6, 2, asks="query heads 0, 1 and 2 read KV head 0"),
                gqa_case(3, 6, 4, 1, asks="all query heads read the one KV head"),
            ],
            "empty": [
                gqa_case(6, 4, 2, 2, asks="queries 0 and 1 stand before the first key: out 0, lse −∞"),
                gqa_case(7, 5, 2, 1, asks="queries 0 and 1 see no key, query 2 sees key 0"),
            ],
            "numbers": [
                gqa_case(6, 40, 4, 2, times=30, asks="does it hold for large scores too?"),
                gqa_case(3, 20, 2, 1, low=True, asks="the largest score of a row may be negative"),
                gqa_case(4, 9, 2, 2, ahead=True, asks="what a query does not see must not touch its numbers"),
            ],
        },
    )
]

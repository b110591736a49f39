"""Unit 04: a cache with its mask and its growth, and decoding with grouped heads that never copies the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted, kind_of_scores
from course.tasks.judge import Mistake, call, compare_results, extra_memory_below
from course.tasks.mistakes import of_heads, of_scale
from course.tasks.task import Case, NotYet, Task

STEP = {"out": ("query", "dim"), "keys": ("slot", "dim"), "values": ("slot", "dim")}
READ_TOO_FAR = "a slot behind the row's length was read: what lies there means nothing"


def append_case(length: int, new: int, capacity: int, *, times: float = 1, asks: str = "") -> Case:
    """Old tokens, new ones, slots; q is multiplied by `times`."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = (torch.randn(length + new, 16, generator=generator) for _ in range(3))
        keys, values = (_buffer(x[:length], capacity) for x in (k, v))
        _append((q * times)[length:], k[length:], v[length:], keys, values, length, function, asks, times)

    title = f"{counted(new, 'new token')} after {length}, {counted(capacity, 'slot')}"
    return Case(title + kind_of_scores(times), judge)


def every_cut_case(tokens: int, capacity: int) -> Case:
    """A sequence in two calls, the second on what the first returned; cut before, in and behind the sequence."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = (torch.randn(tokens, 16, generator=generator) for _ in range(3))
        for cut in range(tokens + 1):
            keys, values = (_buffer(x[:0], capacity) for x in (k, v))
            for part, old in ((slice(cut), 0), (slice(cut, tokens), cut)):
                try:
                    keys, values = _append(q[part], k[part], v[part], keys, values, old, function, "", 1)
                except NotYet as complaint:
                    count = len(q[part])
                    raise NotYet(f"cut at {cut}, {counted(count, 'new token')} after {old}: {complaint}") from None

    return Case(f"{tokens} tokens, cut at every place, {counted(capacity, 'slot')} at first", judge)


def _buffer(rows: Tensor, capacity: int) -> Tensor:
    """Slots with these rows in front, and NaN behind them."""
    return torch.cat([rows, rows.new_full((capacity - len(rows), rows.shape[1]), torch.nan)])


def _append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: int, function: Callable, asks: str, times
) -> tuple[Tensor, Tensor]:
    """Judges one call. Returns the buffers that it gave."""
    inputs = (q, k, v, keys, values, length)
    got = call(function, *inputs)
    if not isinstance(got, (tuple, list)) or len(got) != 3 or not all(isinstance(x, Tensor) for x in got):
        raise NotYet("return three tensors: out, keys, values")
    capacity = len(keys)
    while capacity < length + len(q):
        capacity *= 2
    for name, buffer in zip(("keys", "values"), got[1:], strict=True):
        if buffer.shape != (capacity, keys.shape[1]):
            grown = "it must double until all fit" if capacity > len(keys) else "there was room: it must stay"
            found = f"{name} has shape {tuple(buffer.shape)}, expected ({capacity}, {keys.shape[1]})"
            raise NotYet(f"{found}: {len(keys)} slots, {length} old and {counted(len(q), 'new token')}; {grown}")
    used = slice(length + len(q))
    trimmed = (got[0], got[1][used], got[2][used])
    compare_results(
        trimmed, inputs, _step, results=STEP, mistakes=STEP_MISTAKES, asks=asks, nan=READ_TOO_FAR, times=times
    )
    return got[1], got[2]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    *,
    diagonal: Callable[[int, int], int] = lambda old, new: old,
    scale: float | None = None,
    write_at: Callable[[int], int] = lambda old: old,
    lost: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, and the used slots of keys and values; the options are slips that people make."""
    used = length + len(q)
    room = max(used, len(keys))

    def stored(buffer: Tensor, rows: Tensor) -> Tensor:
        slots = torch.cat([buffer[:length], buffer.new_zeros(room - length, buffer.shape[1])])
        if lost and used > len(keys) and length:
            slots[length - 1] = 0
        start = write_at(length)
        slots[start : start + len(rows)] = rows
        return slots[:used]

    all_keys, all_values = stored(keys, k), stored(values, v)
    scores = q @ all_keys.T * (q.shape[1] ** -0.5 if scale is None else scale)
    visible = torch.ones(len(q), used, dtype=torch.bool).tril(diagonal(length, len(q)))
    out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ all_values
    return out.nan_to_num(), all_keys, all_values


STEP_MISTAKES = [
    Mistake(
        "there is no mask: a new token sees the new ones behind it",
        lambda *x: _step(*x, diagonal=lambda old, new: old + new),
    ),
    Mistake(
        "the mask is top-left aligned: new query i must see all old keys too, and the new ones up to its own",
        lambda *x: _step(*x, diagonal=lambda old, new: 0),
    ),
    Mistake(
        "the mask is off by one: a new token must see itself",
        lambda *x: _step(*x, diagonal=lambda old, new: old - 1),
    ),
    Mistake(
        "the mask is off by one: each new token sees one key too many",
        lambda *x: _step(*x, diagonal=lambda old, new: old + 1),
    ),
    Mistake(
        "the new rows overwrite the old ones: write them behind, from slot `length` on",
        lambda *x: _step(*x, write_at=lambda old: 0),
    ),
    Mistake(
        "the new rows begin one slot too early: the last old token is lost",
        lambda *x: _step(*x, write_at=lambda old: max(0, old - 1)),
    ),
    Mistake("growing loses the last old row: copy all `length` of them", lambda *x: _step(*x, lost=True)),
    *of_scale(_step),
]


def decode_case(lengths: list[int], h: int, hk: int, slots: int, *, times: float = 1, asks: str = "") -> Case:
    """Rows of these lengths in a cache of so many slots, query heads and KV heads."""

    def judge(function: Callable, generator: Generator) -> None:
        inputs = _cache(lengths, h, hk, slots, generator, times)
        compare_results(
            call(function, *inputs),
            inputs,
            _decode,
            results={"out": ("row", "head", "dim")},
            mistakes=DECODE_MISTAKES,
            asks=asks,
            nan=f"{READ_TOO_FAR} (and 0 · NaN is NaN: masking the scores alone is not enough)",
            times=times,
        )

    rows = f"{counted(len(lengths), 'row')} of {', '.join(map(str, lengths))}"
    heads = f"{counted(h, 'query head')} on {counted(hk, 'KV head')}"
    return Case(f"{rows} in {slots} slots, {heads}{kind_of_scores(times)}", judge)


def decode_memory_case(length: int = 32_768, h: int = 32, hk: int = 2) -> Case:
    """A length at which keys and values repeated for each query head need hundreds of MiB."""

    def judge(function: Callable, generator: Generator) -> None:
        inputs = _cache([length], h, hk, length, generator, 1, d=64)
        too_much = "the cache is repeated for each query head: let the heads of a group share one product"
        result = extra_memory_below(64 << 20, function, *inputs, too_much=too_much)
        compare_results(result, inputs, _decode, results={"out": ("row", "head", "dim")}, times=16)  # sums this long

    return Case(f"{length} tokens, {h} query heads on {counted(hk, 'KV head')}: memory", judge)


def _cache(
    lengths: list[int], h: int, hk: int, slots: int, generator: Generator, times: float, d: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(len(lengths), h, d, generator=generator) * times
    keys, values = (torch.randn(len(lengths), slots, hk, d, generator=generator) for _ in range(2))
    for row, length in enumerate(lengths):
        keys[row, length:], values[row, length:] = torch.nan, torch.nan
    return q, keys, values, torch.tensor(lengths)


def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    shift: int = 0,
    interleaved: bool = False,
    scale: float | None = None,
    longest: bool = False,
) -> Tensor:
    """The right answer; the options are slips that people make."""
    heads_k, rows = keys.shape[2], []
    for row, length in enumerate(lengths.tolist()):
        stop = max(1, (int(lengths.max()) if longest else length) + shift)
        k, v = (x[row, :stop].nan_to_num().transpose(0, 1) for x in (keys, values))  # (hk, stop, d)
        group = (-1, heads_k) if interleaved else (heads_k, -1)
        queries = q[row].unflatten(0, group)
        queries = queries.transpose(0, 1) if interleaved else queries  # (hk, group, d)
        scores = queries @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = scores.softmax(-1) @ v
        rows.append((out.transpose(0, 1) if interleaved else out).flatten(0, 1))
    return torch.stack(rows)


DECODE_MISTAKES = [
    *of_heads(_decode),
    Mistake(
        "each row is read to the longest length: a shorter row ends at its own",
        lambda *x: _decode(*x, longest=True),
    ),
    Mistake("the last token is not seen: a row of length n has slots 0 … n − 1", lambda *x: _decode(*x, shift=-1)),
    Mistake("one slot too many is seen: a row of length n has slots 0 … n − 1", lambda *x: _decode(*x, shift=1)),
    *of_scale(_decode),
]

TASKS = [
    Task(
        "append_and_attend",
        unit="04_kv_cache",
        minutes=40,
        difficulty=3,
        parts={
            "decode": [
                append_case(5, 1, 8, asks="one query: it sees all 5 old keys and itself"),
                append_case(0, 1, 4, asks="nothing was there before: the token sees itself"),
                append_case(6, 1, 8, times=30, asks="does it hold for large scores too?"),
            ],
            "append": [
                append_case(5, 3, 8, asks="new query 0 sees 6 of 8 keys"),
                append_case(0, 4, 4, asks="a prefill: query 0 sees key 0"),
            ],
            "empty": [
                append_case(6, 0, 8, asks="no new token: out has no rows, and nothing changes"),
                append_case(8, 0, 8, asks="no new token, and the cache is full: it need not grow"),
            ],
            "growth": [
                append_case(4, 1, 4, asks="4 slots become 8"),
                append_case(3, 9, 4, asks="4 slots become 16"),
            ],
            "cuts": [every_cut_case(9, 2)],
        },
    ),
    Task(
        "gqa_decode",
        unit="04_kv_cache",
        minutes=35,
        difficulty=3,
        parts={
            "heads": [
                decode_case([7], 6, 2, 7, asks="query heads 0, 1 and 2 read KV head 0"),
                decode_case([5, 5], 4, 1, 5, asks="all query heads read the one KV head"),
                decode_case([9], 4, 4, 9, times=30, asks="does it hold for large scores too?"),
            ],
            "lengths": [
                decode_case([3, 8, 1], 4, 2, 10, asks="each row sees its own slots only"),
                decode_case([6, 2], 2, 2, 6, asks="each row sees its own slots only"),
            ],
            "memory": [decode_memory_case()],
        },
    ),
]

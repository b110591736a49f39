"""Unit 04: a cache with its mask and its growth, and decoding with grouped heads that never copies the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted, kind_of_scores
from course.tasks.judge import Mistake, call, check_form, compare_results, extra_memory_below
from course.tasks.mistakes import of_heads, of_scale
from course.tasks.slots import READ_TOO_FAR, filled_slots, judge_beside_nan, wrongly_stored
from course.tasks.task import Case, NotYet, Task
from minillm.measure import format_bytes

OUT = {"out": ("query", "dim")}
STEP = {**OUT, "keys": ("slot", "dim"), "values": ("slot", "dim")}
HEADS = {"out": ("row", "head", "dim")}


def append_case(length: int, new: int, capacity: int, *, times: float = 1, asks: str = "") -> Case:
    """Old tokens, new ones, slots; q is multiplied by `times`."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = (torch.randn(length + new, 16, generator=generator) for _ in range(3))
        keys, values = (filled_slots(x[:length], capacity) for x in (k, v))
        _append((q * times)[length:], k[length:], v[length:], keys, values, length, function, asks, times)

    title = f"{counted(new, 'new token')} after {length}, {counted(capacity, 'slot')}"
    return Case(title + kind_of_scores(times), judge)


def every_cut_case(tokens: int, capacity: int) -> Case:
    """A sequence in two calls, the second on what the first returned; cut before, in and behind the sequence."""

    def judge(function: Callable, generator: Generator) -> None:
        q, k, v = (torch.randn(tokens, 16, generator=generator) for _ in range(3))
        for cut in range(tokens + 1):
            keys, values = (filled_slots(x[:0], capacity) for x in (k, v))
            for part, old in ((slice(cut), 0), (slice(cut, tokens), cut)):
                try:
                    keys, values = _append(q[part], k[part], v[part], keys, values, old, function, "", 1)
                except NotYet as complaint:
                    count = len(q[part])
                    raise NotYet(f"cut at {cut}, {counted(count, 'new token')} after {old}: {complaint}") from None

    return Case(f"{tokens} tokens, cut at every place, {counted(capacity, 'slot')} at first", judge)


def _append(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: int, function: Callable, asks: str, times
) -> tuple[Tensor, Tensor]:
    """Judges one call. Returns the buffers that it gave."""
    inputs = (q, k, v, keys, values, length)
    got = _three_tensors(call(function, *inputs))
    capacity = len(keys)
    while capacity < length + len(q):
        capacity *= 2
    for name, buffer in zip(("keys", "values"), got[1:], strict=True):
        if buffer.shape != (capacity, keys.shape[1]):
            grown = "it must double until all fit" if capacity > len(keys) else "there was room: it must stay"
            found = f"{name} has shape {tuple(buffer.shape)}, expected ({capacity}, {keys.shape[1]})"
            raise NotYet(f"{found}: {len(keys)} slots, {length} old and {counted(len(q), 'new token')}; {grown}")
    used = slice(length + len(q))
    check_form((got[0], got[1][used], got[2][used]), (q, *_held(*inputs)), STEP)
    if len(q) and all(map(torch.equal, (got[1][used], got[2][used]), _held(q, v, k, keys, values, length))):
        raise NotYet("keys holds the new values, and values the new keys")
    for name, buffer, old, new in (("keys", got[1], keys, k), ("values", got[2], values, v)):
        if complaint := wrongly_stored(name, buffer, old, new, length):
            raise NotYet(complaint)

    def judge_out(given: tuple, result: tuple, question: str) -> None:
        every_slot = Mistake(READ_TOO_FAR, lambda q, *_: _attend(q, *(x.to(q.dtype) for x in result[1:])))
        compare_results(
            result[0], given, _step, results=OUT, mistakes=[*STEP_MISTAKES, every_slot], asks=question, times=times
        )

    judge_beside_nan(function, inputs, got, _with_numbers(inputs), judge_out, asks)
    return got[1], got[2]


def _three_tensors(got: object) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(got, (tuple, list)) or len(got) != 3 or not all(isinstance(x, Tensor) for x in got):
        raise NotYet("return three tensors: out, keys, values")
    return got[0], got[1], got[2]


def _with_numbers(inputs: tuple) -> tuple:
    """The same, with numbers in the unused slots."""
    q, k, v, keys, values, length = inputs
    numbers = torch.randn(2, *keys.shape, generator=Generator().manual_seed(0))
    return q, k, v, *(torch.cat([x[:length], y[length:]]) for x, y in zip((keys, values), numbers, strict=True)), length


def _held(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The used slots of keys and values after the new rows are there."""
    return torch.cat([keys[:length], k]), torch.cat([values[:length], v])


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None, scale: float | None = None, axis: int = -1
) -> Tensor:
    scores = q @ keys.T * (q.shape[1] ** -0.5 if scale is None else scale)
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(axis).nan_to_num() @ values


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    *,
    sees: Callable[[Tensor, Tensor, int], Tensor] = lambda i, j, old: j <= old + i,
    scale: float | None = None,
    axis: int = -1,
) -> Tensor:
    """out; the options are slips that people make. `sees` is given the new token i, the slot j, and the old length."""
    i, j = torch.arange(len(q))[:, None], torch.arange(length + len(q))
    return _attend(q, *_held(q, k, v, keys, values, length), sees(i, j, length), scale, axis)


STEP_MISTAKES = [
    Mistake(
        "there is no mask: a new token sees the new ones behind it",
        lambda *x: _step(*x, sees=lambda i, j, old: j + 0 * i >= 0),
    ),
    Mistake(
        "the mask is top-left aligned, by the new token's own index i: its place is `length` + i, "
        "so it must see all old keys too, and the new ones up to its own",
        lambda *x: _step(*x, sees=lambda i, j, old: j <= i),
    ),
    Mistake(
        "the mask is off by one: a new token must see itself",
        lambda *x: _step(*x, sees=lambda i, j, old: j < old + i),
    ),
    Mistake(
        "the mask is off by one: each new token sees one key too many",
        lambda *x: _step(*x, sees=lambda i, j, old: j <= old + i + 1),
    ),
    Mistake(
        "the triangle of the mask lies over the first slots: it belongs over the new ones, from slot `length` on",
        lambda *x: _step(*x, sees=lambda i, j, old: (j <= i) | (j >= len(i))),
    ),
    Mistake(
        "only old slots are attended to: a new token must see itself, and the new ones before it",
        lambda *x: _step(*x, sees=lambda i, j, old: (j < old) & (i >= 0)),
    ),
    Mistake(
        "only new tokens are attended to: the old ones in the cache count too",
        lambda *x: _step(*x, sees=lambda i, j, old: (j >= old) & (j <= old + i)),
    ),
    Mistake("the softmax runs over the queries: it must run over the keys", lambda *x: _step(*x, axis=0)),
    *of_scale(_step),
]


def decode_case(lengths: list[int], h: int, hk: int, slots: int, *, times: float = 1, asks: str = "") -> Case:
    """Rows of these lengths in a cache of so many slots, query heads and KV heads."""

    def judge(function: Callable, generator: Generator) -> None:
        def judge_out(given: tuple, result: tuple, question: str) -> None:
            compare_results(
                result[0], given, _decode, results=HEADS, mistakes=DECODE_MISTAKES, asks=question, times=times
            )

        inputs = _cache(lengths, h, hk, slots, generator, times)
        got = call(function, *inputs)
        check_form((got,), (inputs[0],), HEADS)
        finite = _cache(lengths, h, hk, slots, Generator().manual_seed(0), times, unused=False)
        judge_beside_nan(function, inputs, (got,), finite, judge_out, asks)

    rows = f"{counted(len(lengths), 'row')} of {', '.join(map(str, lengths))}"
    heads = f"{counted(h, 'query head')} on {counted(hk, 'KV head')}"
    return Case(f"{rows} in {slots} slots, {heads}{kind_of_scores(times)}", judge)


def decode_memory_case(length: int = 32_768, h: int = 32, hk: int = 2) -> Case:
    """A length at which keys and values repeated for each query head need hundreds of MiB."""

    def judge(function: Callable, generator: Generator) -> None:
        inputs = _cache([length], h, hk, length, generator, 1, d=64)
        cache = inputs[1].nbytes + inputs[2].nbytes
        too_much = (
            f"the call needs too much memory beside the cache, which has {format_bytes(cache)} itself. "
            f"What is so large? K and V repeated for every query head would be {format_bytes(cache * h // hk)}, "
            f"a copy of the cache in float64 {format_bytes(2 * cache)}; neither is needed"
        )
        result = extra_memory_below(64 << 20, function, *inputs, too_much=too_much)
        compare_results(result, inputs, _decode, results=HEADS, times=16)  # sums this long

    return Case(f"{length} tokens, {h} query heads on {counted(hk, 'KV head')}: memory", judge)


def _cache(
    lengths: list[int],
    h: int,
    hk: int,
    slots: int,
    generator: Generator,
    times: float,
    d: int = 16,
    unused: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys, values, lengths; with NaN in the unused slots, or with numbers there."""
    q = torch.randn(len(lengths), h, d, generator=generator) * times
    keys, values = (torch.randn(len(lengths), slots, hk, d, generator=generator) for _ in range(2))
    for row, length in enumerate(lengths):
        if unused:
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
    read: Callable[[Tensor], int] | None = None,
    axis: int = -1,
) -> Tensor:
    """The right answer; the options are slips that people make. `read` says how many slots of all rows are read."""
    heads_k, rows = keys.shape[2], []
    for row, length in enumerate(lengths.tolist()):
        stop = max(1, (read(lengths) if read else length) + shift)
        k, v = (x[row, :stop].nan_to_num().transpose(0, 1) for x in (keys, values))  # (hk, stop, d)
        group = (-1, heads_k) if interleaved else (heads_k, -1)
        queries = q[row].unflatten(0, group)
        queries = queries.transpose(0, 1) if interleaved else queries  # (hk, group, d)
        scores = queries @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out = scores.softmax(axis) @ v
        rows.append((out.transpose(0, 1) if interleaved else out).flatten(0, 1))
    return torch.stack(rows)


DECODE_MISTAKES = [
    *of_heads(_decode),
    Mistake(
        "each row is read to the longest length: a shorter row ends at its own",
        lambda *x: _decode(*x, read=lambda lengths: int(lengths.max())),
    ),
    Mistake(
        "each row is read to the first row's length: row i ends at `lengths[i]`",
        lambda *x: _decode(*x, read=lambda lengths: int(lengths[0])),
    ),
    Mistake(READ_TOO_FAR, lambda *x: _decode(*x, read=lambda _: x[1].shape[1])),
    Mistake("the last token is not seen: a row of length n has slots 0 … n − 1", lambda *x: _decode(*x, shift=-1)),
    Mistake("one slot too many is seen: a row of length n has slots 0 … n − 1", lambda *x: _decode(*x, shift=1)),
    Mistake(
        "the softmax runs over the query heads of a group: it must run over the slots",
        lambda *x: _decode(*x, axis=-2),
    ),
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

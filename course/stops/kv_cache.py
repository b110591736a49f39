"""Lesson 04: writing to a buffer of keys and values, the loop that makes a model talk, and top-p."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from course.tasks.cases import counted
from course.tasks.judge import Mistake, call, compare_results
from course.tasks.slots import filled_slots, wrongly_stored
from course.tasks.task import Case, NotYet, Task
from minillm.cache import KVCache
from minillm.config import ModelConfig


def append_rows(buffer_k, buffer_v, length, k, v):
    """Writes new rows behind the old ones; gives back what is held, as views, and the new length."""
    stop = length + len(k)
    buffer_k[length:stop], buffer_v[length:stop] = k, v
    return buffer_k[:stop], buffer_v[:stop], stop


def greedy(model, input_ids, max_new_tokens):
    """The ids that follow, each the one with the largest logit."""
    cache = KVCache(model.config, batch_size=1)
    written: list[int] = []
    while len(written) < max_new_tokens:
        logits = model(input_ids, kv_cache=cache)  # (1, new tokens, vocab_size)
        token = logits[:, -1].argmax(-1)  # what follows the last token
        written.append(int(token))
        input_ids = token[:, None]  # fed back, alone: the cache has the rest
    return written


def nucleus(probabilities, p):
    """Only the fewest tokens that together reach p, the likeliest first; what is left sums to 1."""
    largest, tokens = probabilities.sort(descending=True)
    before = largest.cumsum(0) - largest  # what the likelier tokens have together
    kept = torch.zeros_like(probabilities)
    kept[tokens[before < p]] = largest[before < p]
    return kept / kept.sum()


def append_case(length: int, new: int, capacity: int) -> Case:
    """Old rows, new ones, slots; there is room."""

    def judge(function: Callable, generator: Generator) -> None:
        k, v = torch.randn(2, length + new, 8, generator=generator)
        old_k, old_v = filled_slots(k[:length], capacity), filled_slots(v[:length], capacity)
        inputs = (old_k, old_v, length, k[length:], v[length:])
        got, (buffer_k, buffer_v) = call(function, *inputs, through=lambda answer, *x: (answer(*x), x[:2]))
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            raise NotYet("return three things: the held keys, the held values, and the new length")
        if torch.equal(buffer_k[length : length + new], v[length:]) and new:
            raise NotYet("the buffer of keys holds the new values: is k written to buffer_k, and v to buffer_v?")
        for name, buffer, old, rows in (("buffer_k", buffer_k, old_k, k), ("buffer_v", buffer_v, old_v, v)):
            _check_written(name, buffer, old, rows[length:], length)
        for name, held, buffer in (("keys", got[0], buffer_k), ("values", got[1], buffer_v)):
            _check_held(f"the held {name}", held, buffer, length, new)
        if not isinstance(got[2], (int, Tensor)) or int(got[2]) != length + new:
            raise NotYet(f"the new length is {got[2]}, expected {length + new}: {length} old and {new} new")

    return Case(f"{counted(new, 'new row')} after {length}, {counted(capacity, 'slot')}", judge)


def _check_written(name: str, buffer: Tensor, old: Tensor, new: Tensor, length: int) -> None:
    unchanged = torch.equal(buffer.nan_to_num(), old.nan_to_num())
    if unchanged and len(new):
        raise NotYet(f"{name} is as it was: write the new rows into its slots; `cat` makes another tensor")
    if complaint := wrongly_stored(name, buffer, old, new, length):
        raise NotYet(complaint)
    if not buffer[length + len(new) :].isnan().all():
        raise NotYet(f"slots of {name} behind the new rows have changed: they are for the next tokens")


def _check_held(name: str, held: Any, buffer: Tensor, length: int, new: int) -> None:
    if not isinstance(held, Tensor):
        raise NotYet(f"{name} are a {type(held).__name__}, expected a tensor")
    stop, rows = length + new, len(held)
    if held.shape != buffer[:stop].shape:
        reasons = {
            len(buffer): "what lies behind the new rows means nothing, leave it out",
            length: "the new rows belong to it",
            new: "the old rows belong to it",
        }
        reason = f": {reasons[rows]}" if rows in reasons else ""
        raise NotYet(f"{name} have shape {tuple(held.shape)}, expected {tuple(buffer[:stop].shape)}{reason}")
    if not torch.equal(held, buffer[:stop]):
        raise NotYet(f"{name} are not slots 0 … {stop - 1} of the buffer")
    if held.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        raise NotYet(f"{name} are a copy: a slice of the buffer is a view, and copies nothing")


class CountingModel:
    """Stands for a language model where a loop is judged: exact, and it counts the tokens that it computes.

    Its next token depends on every token before it and on their places: a cache carries them, as keys.
    """

    def __init__(self) -> None:
        self.config = ModelConfig(
            vocab_size=29,
            hidden_size=2,
            intermediate_size=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=256,
        )
        self.computed = 0

    def __call__(self, input_ids: Tensor, kv_cache: KVCache | None = None, **_: Any) -> Tensor:
        """Logits (1, seqlen, vocab_size), as MiniLLM's."""
        if input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, wants (1, seqlen), one token or more")
        self.computed += input_ids.shape[1]
        tokens = input_ids[..., None, None].float().expand(-1, -1, 1, 2)
        held = tokens if kv_cache is None else kv_cache.append(tokens, tokens, 0).k
        places = torch.arange(1, held.shape[1] + 1)
        following = ((held[..., 0, 0] * places).cumsum(1) * 7 + 3) % self.config.vocab_size  # whole numbers: exact
        logits = -((torch.arange(self.config.vocab_size) - following[..., None]) ** 2)
        return logits[:, -input_ids.shape[1] :]


def greedy_case(prompt: int, new: int) -> Case:
    """A prompt of so many tokens, and so many to write."""

    def judge(function: Callable, generator: Generator) -> None:
        model = CountingModel()
        ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator)
        got, right = _as_ids(call(function, model, ids, new)), greedy(CountingModel(), ids, new)
        enough = prompt + new - 1
        if got == right:
            if model.computed <= enough + 1:  # one step more, whose logits go unused, costs little
                return
            raise NotYet(
                f"the ids are right, but {model.computed} tokens went through the model, and {enough} are enough: "
                "give each call the same cache, and after the prompt only the newest token"
            )
        for mistake in GREEDY_MISTAKES:
            if got == mistake.answer(CountingModel(), ids, new):
                assert isinstance(mistake.message, str)
                raise NotYet(mistake.message)
        if len(got) != new:
            raise NotYet(f"{counted(len(got), 'id')}, expected {new}")
        first = next(i for i in range(new) if got[i] != right[i])
        raise NotYet(f"new token {first} is {got[first]}, expected {right[first]}")

    return Case(f"{counted(new, 'new token')} after a prompt of {prompt}", judge)


def _as_ids(got: Any) -> list[int]:
    if got is None:
        raise NotYet("it returns nothing: is there a `return`?")
    try:
        return torch.as_tensor(got).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise NotYet("return the new ids as a list of int") from None


def _loop(
    model: CountingModel,
    ids: Tensor,
    new: int,
    *,
    cached: bool = True,
    feed: Callable[[Tensor, Tensor], Tensor] = lambda prompt, token: token,
    place: int = -1,
    choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
) -> list[int]:
    """The right answer; the options are slips that people make. `feed` is given all ids so far, and the newest."""
    cache, so_far, fed = KVCache(model.config, 1) if cached else None, ids, ids
    for _ in range(new):
        token = choose(model(fed, kv_cache=cache)[:, place])[:, None]
        so_far = torch.cat([so_far, token], dim=1)
        fed = feed(so_far, token)
    return so_far[0, ids.shape[1] :].tolist()


GREEDY_MISTAKES = [
    Mistake(
        "each step is given the newest token alone, and no cache: it cannot know what came before",
        lambda *x: _loop(*x, cached=False),
    ),
    Mistake(
        "the whole text is fed again at each step, and the cache holds it twice: after the prompt, feed the newest "
        "token only",
        lambda *x: _loop(*x, feed=lambda so_far, token: so_far),
    ),
    Mistake(
        "the prompt is fed again at each step: feed the newest token",
        lambda model, ids, new: _loop(model, ids, new, feed=lambda so_far, token: ids),
    ),
    Mistake(
        "the logits of the first position are used: the last one, -1, says what follows",
        lambda *x: _loop(*x, place=0),
    ),
    Mistake(
        "it takes the smallest logit: the largest is the likeliest token",
        lambda *x: _loop(*x, choose=lambda logits: logits.argmin(-1)),
    ),
    Mistake(
        "the largest logit itself is taken for an id: `argmax` gives its place, which is the id",
        lambda *x: _loop(*x, choose=lambda logits: logits.amax(-1)),
    ),
    Mistake(
        "the prompt is returned too: give back the new ids only",
        lambda model, ids, new: ids[0].tolist() + _loop(model, ids, new),
    ),
    Mistake("the first new token is missing", lambda *x: _loop(*x)[1:]),
    Mistake("the last new token is missing", lambda *x: _loop(*x)[:-1]),
    Mistake("there is one token too many", lambda model, ids, new: _loop(model, ids, new + 1)),
]


def nucleus_case(p: float, spread: float = 1, size: int = 10) -> Case:
    """A distribution over a few tokens: the larger the spread of its logits, the more peaked."""

    def judge(function: Callable, generator: Generator) -> None:
        probabilities = (spread * torch.randn(size, generator=generator)).softmax(0)
        got = call(function, probabilities, p)
        if isinstance(got, Tensor) and got.isnan().any():
            raise NotYet("the result is NaN: is any token left? The likeliest one always is")
        inputs, results = (probabilities, p), {"the result": ("token",)}
        compare_results(got, inputs, nucleus, results=results, mistakes=NUCLEUS_MISTAKES)

    kind = "peaked" if spread > 2 else "flat"
    return Case(f"{counted(size, 'token')}, {kind}, p = {p:g}", judge)


def _kept(
    keep: Callable[[Tensor, Tensor, float], Tensor], descending: bool = True
) -> Callable[[Tensor, float], Tensor]:
    """Keeps other tokens: chosen by their probabilities in order, what all up to each have together, and p."""

    def answer(probabilities: Tensor, p: float) -> Tensor:
        ordered, tokens = probabilities.sort(descending=descending)
        chosen = keep(ordered, ordered.cumsum(0), p)
        kept = torch.zeros_like(probabilities)
        kept[tokens[chosen]] = ordered[chosen]
        return kept / kept.sum()

    return answer


def _first_that_reaches(probabilities: Tensor, p: float) -> Tensor:
    """At p = 1 rounding may leave every running sum below p; `argmax` of "none" is then place 0."""
    return nucleus(probabilities, p if p < 1 else 0.0001)


def _in_order(probabilities: Tensor, p: float) -> Tensor:
    return nucleus(probabilities, p).sort(descending=True).values


def _softmax_again(probabilities: Tensor, p: float) -> Tensor:
    kept = nucleus(probabilities, p)
    return torch.where(kept > 0, probabilities, -torch.inf).softmax(0)


NUCLEUS_MISTAKES = [
    Mistake(
        "the token with which p is reached is left out: it belongs to those that stay",
        _kept(lambda _, together, p: together <= p),
    ),
    Mistake(
        "each token is compared with p alone: what counts is what the likelier ones have together",
        _kept(lambda ordered, _, p: ordered >= p),
    ),
    Mistake(
        "the unlikeliest tokens stay: sort in descending order",
        _kept(lambda ordered, together, p: together - ordered < p, descending=False),
    ),
    Mistake(
        "one token too many stays: none is needed after p is reached",
        _kept(
            lambda ordered, together, p: together - ordered - ordered.roll(1).index_fill(0, torch.tensor([0]), 0) < p
        ),
    ),
    Mistake(
        "only the likeliest token stays: at p = 1 rounding can leave the whole sum below p, so that no running sum "
        "reaches it; all tokens stay then",
        _first_that_reaches,
    ),
    Mistake("the result is sorted: each probability belongs at its own token's place", _in_order),
    Mistake(
        "what stays does not sum to 1: divide by its sum",
        lambda probabilities, p: torch.where(nucleus(probabilities, p) > 0, probabilities, 0),
    ),
    Mistake("softmax is taken of probabilities: divide by their sum instead", _softmax_again),
]

STOPS = [
    Task(
        "append_rows",
        unit="04_kv_cache",
        minutes=4,
        difficulty=1,
        parts={"result": [append_case(0, 4, 8), append_case(4, 1, 8), append_case(5, 3, 8), append_case(6, 0, 8)]},
        model_answer=append_rows,
    ),
    Task(
        "greedy",
        unit="04_kv_cache",
        minutes=8,
        difficulty=2,
        parts={"result": [greedy_case(5, 6), greedy_case(1, 4), greedy_case(7, 1)]},
        model_answer=greedy,
    ),
    Task(
        "nucleus",
        unit="04_kv_cache",
        minutes=6,
        difficulty=2,
        parts={"result": [nucleus_case(0.1), nucleus_case(0.7), nucleus_case(0.3, spread=5), nucleus_case(1)]},
        model_answer=nucleus,
    ),
]

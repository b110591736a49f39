"""Any history of prefill, append, decode, truncate and fork leaves each row as if it had been computed at once.

Hypothesis writes the histories; everything is compared in float64. Then the tests are tested: bugs that such code
is known for are planted, and the same histories have to find each of them.
"""

from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from minillm.cache import KVCache
from minillm.decode import Decoder
from minillm.measure import assert_within_budget
from minillm.model import MiniLLM
from tests.cache.models import BACKENDS, random_model
from tests.cache.test_same_logits import pad

ROWS, LIMIT, EXAMPLES, STEPS = 2, 24, 150, 20
MODEL = random_model(torch.float64, max_position_embeddings=LIMIT, hidden_size=16, intermediate_size=24)
DECODER = Decoder(MODEL)
TOKENS = st.lists(st.integers(0, 60), max_size=6)
DONE: Counter[str] = Counter()
SIDES, OPTIONS = st.sampled_from(["left", "right"]), st.sampled_from(list(BACKENDS.values()))


class Histories(RuleBasedStateMachine):
    """A cache goes with the tokens that each of its rows should hold."""

    caches = Bundle("caches")

    @initialize(target=caches, capacity=st.integers(1, 8))
    def start(self, capacity):
        DONE["histories"] += 1
        return KVCache(MODEL.config, ROWS, capacity=capacity, dtype=torch.float64), [[] for _ in range(ROWS)]

    @rule(of=caches, new=st.tuples(*[TOKENS] * ROWS), side=SIDES, options=OPTIONS)
    def prefill_or_append(self, of, new, side, options):
        cache, rows = of
        ids, mask = pad([torch.tensor(tokens, dtype=torch.int64) for tokens in new], side)
        before = cache.lengths
        if any(len(row) + len(tokens) > LIMIT for row, tokens in zip(rows, new, strict=True)):
            with pytest.raises(ValueError, match="max_position_embeddings"):
                call(MODEL, ids, cache, token_mask=mask, **options)
            assert cache.lengths == before
            DONE["refusals at the limit"] += 1
            return
        DONE["forwards"] += 1
        logits = call(MODEL, ids, cache, token_mask=mask, **options)
        for row, tokens, got, real in zip(rows, new, logits, mask, strict=True):
            row.extend(tokens)
            check(got[real], row)
        assert cache.lengths == [len(row) for row in rows]

    @rule(of=caches, new=st.lists(st.integers(0, 60), min_size=ROWS, max_size=ROWS), packed=st.booleans())
    def decode(self, of, new, packed):
        cache, rows = of
        if max(map(len, rows)) == LIMIT:
            return
        ragged = len(set(map(len, rows))) > 1
        DONE[f"{'packed steps' if packed else 'steps'}{' of rows of different lengths' * ragged}"] += 1
        ids = torch.tensor(new)
        logits = DECODER.step(ids, cache)[:, None] if packed else call(MODEL, ids[:, None], cache)
        for row, token, got in zip(rows, new, logits, strict=True):
            row.append(token)
            check(got, row)

    @rule(of=caches, shares=st.tuples(*[st.floats(0, 1)] * ROWS))
    def truncate(self, of, shares):
        cache, rows = of
        DONE["truncations"] += 1
        lengths = [round(share * len(row)) for share, row in zip(shares, rows, strict=True)]
        cache.truncate(lengths)
        for row, length in zip(rows, lengths, strict=True):
            del row[length:]

    @rule(target=caches, of=caches)
    def fork(self, of):
        DONE["forks"] += 1
        cache, rows = of
        return cache.fork(), [list(row) for row in rows]


@torch.no_grad()
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


@torch.no_grad()
def check(logits, row):
    """The logits of a row's last tokens against those of the whole row without a cache."""
    if len(logits):
        expected = {name: whole[:, -len(logits) :] for name, whole in truth(tuple(row)).items()}
        assert_within_budget(logits[None], multiple=8, **expected)


@cache
def truth(row):
    whole = FORWARD(MODEL, torch.tensor([row]), use_flash_attention=False)
    return {"naive": whole, "reference": whole}


FORWARD = MiniLLM.forward  # as it is before any bug is planted


def run(examples=EXAMPLES):
    fast = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    run_state_machine_as_test(Histories, settings=fast)


def test_every_history_gives_the_logits_of_the_whole_rows(record_property):
    DONE.clear()
    run()
    record_property("cache", ", ".join(f"{count} {what}" for what, count in DONE.most_common()))
    assert len(DONE) == 9, DONE  # every kind of call came up


def off_by_one_after_an_append(monkeypatch):
    embed = MiniLLM._embed
    monkeypatch.setattr(
        MiniLLM, "_embed", lambda self, ids, past, *counts: embed(self, ids, [p + (p > 0) for p in past], *counts)
    )


def a_stale_mask_on_a_fork(monkeypatch):
    """The fork keeps looking at the lengths of the cache that it came from."""

    def fork(self):
        copy = KVCache.__new__(KVCache)
        copy.limit, copy._buffer, copy._lengths = self.limit, self._buffer.clone(), self._lengths
        return copy

    monkeypatch.setattr(KVCache, "fork", fork)


def a_fork_that_shares_its_buffer(monkeypatch):
    original = KVCache.fork

    def fork(self):
        copy = original(self)
        copy._buffer = self._buffer
        return copy

    monkeypatch.setattr(KVCache, "fork", fork)


def growth_that_loses_the_last_row(monkeypatch):
    reserve = KVCache.reserve

    def lossy(self, tokens):
        capacity = self.capacity
        reserve(self, tokens)
        if self.capacity > capacity:
            self._buffer[:, :, -1, capacity - 1 :] = 0

    monkeypatch.setattr(KVCache, "reserve", lossy)


def a_truncation_that_forgets_one_layer(monkeypatch):
    truncate = KVCache.truncate

    def forgetful(self, lengths):
        first = self._lengths[0]
        truncate(self, lengths)
        self._lengths[0] = first

    monkeypatch.setattr(KVCache, "truncate", forgetful)
    monkeypatch.setattr(KVCache, "check_fits", lambda *arguments: None)  # it refuses layers that disagree


BUGS = [
    off_by_one_after_an_append,
    a_stale_mask_on_a_fork,
    a_fork_that_shares_its_buffer,
    growth_that_loses_the_last_row,
    a_truncation_that_forgets_one_layer,
]


@pytest.mark.parametrize("plant", BUGS, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found_by_its_logits(plant, monkeypatch, record_property):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="budget .*: over") as found:
        run()
    record_property("cache", f"planted: {plant.__name__}: {str(found.value).splitlines()[0]}")

"""With a cache or without one: the same logits, wherever the sequence is cut, however the rows are padded."""

from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from minillm.cache import KVCache
from minillm.decode import Decoder, quantise
from minillm.measure import assert_within_budget
from minillm.model import SelfAttention
from tests.cache.models import BACKENDS, random_ids, random_model, uncached

LENGTH = 24
SHAPES = {"gqa": {}, "mha": dict(num_key_value_heads=4), "mqa": dict(num_key_value_heads=1, head_dim=6)}


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_decode_and_append_equal_prefill_at_every_split_point(changes, options):
    model, ids = random_model(**changes), random_ids(2, LENGTH)
    expected = uncached(model, ids)
    for split in range(LENGTH + 1):  # 0: nothing before; LENGTH: a full hit and an empty append
        cache = KVCache(model.config, 2, capacity=4)
        parts = [model(ids[:, :split], cache, **options), model(ids[:, split:], cache, **options)]
        assert_within_budget(torch.cat(parts, 1), **expected)
        assert cache.lengths == [LENGTH, LENGTH]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
@torch.no_grad()
def test_token_by_token_equals_all_at_once(options, dtype):
    model, ids = random_model(dtype), random_ids(2, LENGTH)
    cache = KVCache(model.config, 2, capacity=1, dtype=dtype)
    steps = [model(ids[:, i : i + 1], cache, **options) for i in range(LENGTH)]
    assert_within_budget(torch.cat(steps, 1), **uncached(model, ids))


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone_in_prefill_append_and_decode(side, options):
    model = random_model()
    prompts, more = (7, 1, 12, 4), (2, 5, 0, 3)  # tokens a row, in two calls, then two steps
    rows = [random_ids(1, a + b + 2, seed=row) for row, (a, b) in enumerate(zip(prompts, more, strict=True))]
    cache = KVCache(model.config, 4, capacity=2)
    got: list[list[torch.Tensor]] = [[], [], [], []]
    starts = [0, 0, 0, 0]
    for counts in (prompts, more, (1, 1, 1, 1), (1, 1, 1, 1)):
        pieces = [row[0, start : start + count] for row, start, count in zip(rows, starts, counts, strict=True)]
        ids, mask = pad(pieces, side)
        logits = model(ids, cache, token_mask=mask, **options)
        assert not logits[~mask].any()
        for row in range(4):
            got[row].append(logits[row, mask[row]])
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    assert cache.lengths == starts
    for row in range(4):
        assert_within_budget(torch.cat(got[row])[None], **uncached(model, rows[row]))


def pad(rows, side):
    """(batch, longest) ids, garbage where there is padding, and the mask."""
    longest = max(map(len, rows))
    ids = random_ids(len(rows), longest, seed=99)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        room = longest - len(row)
        start = {"left": room, "right": 0, "both": room // 2}[side]
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = True
    return ids, mask


@torch.no_grad()
def test_padding_changes_nothing_without_a_cache_either():
    model, rows = random_model(), [random_ids(9, seed=1), random_ids(3, seed=2)]
    for side in ("left", "right"):
        ids, mask = pad(rows, side)
        logits = model(ids, token_mask=mask)
        last = model(ids, token_mask=mask, last_token_only=True)
        for i, row in enumerate(rows):
            expected = uncached(model, row[None])
            assert_within_budget(logits[i, mask[i]][None], **expected)
            assert_within_budget(last[i], expected["naive"][0, -1:], expected["reference"][0, -1:], multiple=8)


@pytest.mark.parametrize("options", BACKENDS.values(), ids=BACKENDS)
@torch.no_grad()
def test_the_last_token_only_has_the_same_logits_and_leaves_the_same_cache(options):
    model, ids = random_model(), random_ids(2, LENGTH)
    expected = uncached(model, ids)
    whole, cache = KVCache(model.config, 2), KVCache(model.config, 2)
    model(ids[:, :9], whole, **options), model(ids[:, :9], cache, last_token_only=True, **options)
    assert torch.equal(whole._buffer, cache._buffer)
    cache.truncate([9, 4])
    last = model(ids[:, 9:], cache, last_token_only=True, **options)
    for row, length in enumerate((9, 4)):  # rows of different lengths too
        alone = uncached(model, torch.cat([ids[row, :length], ids[row, 9:]])[None])
        assert_within_budget(last[row], alone["naive"][0, -1:], alone["reference"][0, -1:], multiple=8)
    for cache in (None, KVCache(model.config, 2)):
        last = model(ids, cache, last_token_only=True, **options)
        assert_within_budget(last, expected["naive"][:, -1:], expected["reference"][:, -1:], multiple=8)


@torch.no_grad()
def test_a_full_hit_needs_the_last_token_once_more_to_know_what_comes_next():
    model, ids = random_model(), random_ids(2, LENGTH)
    cache = KVCache(model.config, 2)
    expected = model(ids, cache, last_token_only=True)
    cache.truncate(LENGTH - 1)
    again = model(ids[:, -1:], cache)
    assert_within_budget(again, **{k: v[:, -1:] if k != "multiple" else v for k, v in uncached(model, ids).items()})
    assert expected.shape == again.shape and cache.lengths == [LENGTH, LENGTH]


@torch.no_grad()
def test_past_the_limit_the_model_says_so_and_the_cache_is_as_it_was():
    model = random_model()
    cache = KVCache(model.config, 1)
    model(random_ids(1, 60), cache)
    before = cache._buffer.clone()
    with pytest.raises(ValueError, match="would hold 65 tokens, the model's max_position_embeddings is 64"):
        model(random_ids(1, 5), cache)
    assert cache.lengths == [60] and torch.equal(cache._buffer, before)
    decoder = Decoder(model)
    for _ in range(4):
        decoder.step(torch.tensor([1]), cache)
    with pytest.raises(ValueError, match="would hold 65 tokens"):
        decoder.step(torch.tensor([1]), cache)
    assert cache.lengths == [64]


@torch.no_grad()
def test_a_forward_that_is_interrupted_loses_nothing(monkeypatch):
    model, ids = random_model(), random_ids(1, LENGTH)
    cache = KVCache(model.config, 1, capacity=8)
    model(ids[:, :8], cache)
    project = SelfAttention.project

    def interrupted(self, *args):
        if self.layer_idx == 1:
            raise KeyboardInterrupt
        return project(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SelfAttention, "project", interrupted)
        model(ids[:, 8:], cache)
    assert cache.lengths == [8]
    rest = model(ids[:, 8:], cache)
    expected = uncached(model, ids)
    assert_within_budget(rest, expected["naive"][:, 8:], expected["reference"][:, 8:], multiple=8)


def test_ids_are_looked_at_in_a_prompt_and_not_in_a_decode_step(monkeypatch):
    model = random_model()
    cache = KVCache(model.config, 1)
    for prompt in ([[61, 61]], [[61]]):  # a prompt of one token is no decode step
        with pytest.raises(ValueError, match="ids from 61 to 61"):
            model(torch.tensor(prompt), cache)
    model(random_ids(1, 4), cache)
    monkeypatch.setattr(torch.Tensor, "min", lambda *args: pytest.fail("a decode step looked at its ids"))
    model(random_ids(1, 1), cache)


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, dict(batch_size=3), "kv_cache has batch_size 3, wants 2"),
        (dict(num_hidden_layers=3), {}, "kv_cache has layers 3, wants 2"),
        (dict(num_hidden_layers=1), {}, "kv_cache has layers 1, wants 2"),
        (dict(num_key_value_heads=4), {}, "kv_cache has KV heads 4, wants 2"),
        (dict(head_dim=6), {}, "kv_cache has headdim 6, wants 8"),
        (dict(max_position_embeddings=65), {}, "kv_cache has limit 65, wants 64"),
        ({}, dict(dtype=torch.bfloat16), "kv_cache has dtype torch.bfloat16, wants torch.float32"),
        ({}, dict(device="meta"), "kv_cache has device meta, wants cpu"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_and_left_as_it_was(changes, options, message):
    model, ids = random_model(), random_ids(2, 4)
    cache = KVCache(random_model(**changes).config, **(dict(batch_size=2, capacity=8) | options))
    for call in (lambda: model(ids, cache), lambda: Decoder(model).step(ids[:, 0], cache)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(cache.lengths) and cache.capacity == 8


@torch.no_grad()
def test_a_cache_whose_layers_disagree_is_refused():
    model, cache = random_model(), KVCache(random_model().config, 1)
    cache.update(*torch.randn(2, 1, 3, 2, 8), 0)
    for call in (lambda: model(random_ids(1, 4), cache), lambda: Decoder(model).step(torch.tensor([1]), cache)):
        with pytest.raises(ValueError, match=r"kv_cache's layers hold \[\[3\], \[0\]\] tokens: truncate"):
            call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, cache: model(random_ids(2, 3), cache, token_mask=torch.ones(2, 2).bool()), "shape .2, 2. and"),
        (lambda model, cache: model(random_ids(2, 3), cache, token_mask=torch.ones(2, 3).int()), "and torch.int32"),
        (lambda model, cache: model(random_ids(2, 0), cache, last_token_only=True), "at least one token in each row"),
        (
            lambda model, cache: model(
                random_ids(2, 2), cache, token_mask=torch.tensor([[True, True], [False, False]]), last_token_only=True
            ),
            "at least one token in each row",
        ),
        (lambda model, cache: Decoder(model).step(random_ids(2, 1), cache), r"token_ids has shape \(2, 1\), wants"),
    ],
)
def test_bad_calls_say_what_is_wrong_and_leave_the_cache_as_it_was(call, message):
    model = random_model()
    cache = KVCache(model.config, 2)
    with pytest.raises(ValueError, match=message):
        call(model, cache)
    assert cache.lengths == [0, 0] and not cache._buffer.any()


@torch.no_grad()
def test_not_even_a_nan_stays_behind_a_row_that_was_truncated():
    model, ids = random_model(), random_ids(2, 9)
    cache = KVCache(model.config, 2)
    model(ids[:, :4], cache)
    for layer in range(2):
        cache.update(*torch.full((2, 2, 4, 2, 8), torch.nan), layer)
    cache.truncate([4, 4])
    cache.truncate([4, 2])  # rows of different lengths: the shorter one's step reads slots of the longer one too
    logits = Decoder(model).step(torch.stack([ids[0, 4], ids[1, 2]]), cache)
    for row, length in enumerate((5, 3)):
        alone = uncached(model, ids[row : row + 1, :length])
        assert_within_budget(logits[row], alone["naive"][0, -1], alone["reference"][0, -1], multiple=8)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prompts", [(5,), (5, 5), (3, 9, 1), tuple(range(1, 17))], ids=str)
@torch.no_grad()
def test_the_packed_step_equals_the_model(prompts, changes):
    model = random_model(**changes)
    rows = [random_ids(1, length + 6, seed=row) for row, length in enumerate(prompts)]
    ids, mask = pad([row[0, :length] for row, length in zip(rows, prompts, strict=True)], "right")
    cache, decoder = KVCache(model.config, len(rows), capacity=16), Decoder(model)
    model(ids, cache, token_mask=mask)
    steps = []
    for step in range(6):
        tokens = torch.cat([row[0, length + step, None] for row, length in zip(rows, prompts, strict=True)])
        steps.append(decoder.step(tokens, cache).clone())
    for row, length in enumerate(prompts):
        expected = uncached(model, rows[row])
        ours = torch.stack([step[row] for step in steps])[None]
        assert_within_budget(ours, expected["naive"][:, length:], expected["reference"][:, length:], multiple=8)


@torch.no_grad()
def test_int8_weights_stay_within_their_budget():
    """Stated: a weight is off by half a step of its output's scale at most, the logits by a 30th of their size."""
    model = random_model(hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=512)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    weight = model.layers[0].mlp.up_proj.weight
    rounded, scale = quantise(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().max() == 127
    assert ((rounded * scale[:, None].float() - weight).abs() <= 0.51 * scale[:, None]).all()

    ids = random_ids(1, 40, vocab_size=512)
    exact, packed = Decoder(model), Decoder(model, "int8")
    assert packed.nbytes < 0.27 * exact.nbytes
    caches = [KVCache(model.config, 1), KVCache(model.config, 1)]
    for token in ids[0]:
        logits, ours = (
            decoder.step(token[None], cache) for decoder, cache in zip((exact, packed), caches, strict=True)
        )
    assert (ours - logits).norm() < logits.norm() / 30


@torch.no_grad()
def test_a_model_in_another_dtype_works_from_prefill_to_decode():
    for dtype in (torch.bfloat16, torch.float64):
        model, ids = random_model(dtype), random_ids(2, 10)
        cache, decoder = KVCache(model.config, 2, dtype=dtype), Decoder(model)
        model(ids[:, :9], cache)
        expected = uncached(model, ids)
        ours = decoder.step(ids[:, 9], cache)
        assert ours.dtype == dtype
        assert_within_budget(ours, expected["naive"][:, -1], expected["reference"][:, -1], multiple=8)


@torch.no_grad()
def test_torch_compile_without_a_cache_makes_its_graphs_once_for_all_later_lengths():
    torch._dynamo.reset()  # what other tests have compiled counts towards its limits
    model, graphs = random_model(num_hidden_layers=1), CompileCounter()
    compiled = torch.compile(model, backend=graphs)
    made = []
    for length in (4, 5, 6, 7):
        ids = random_ids(2, length)
        assert_within_budget(compiled(ids, attention_backend="sdpa"), **uncached(model, ids))
        made.append(graphs.frame_count)
    assert 0 < made[0] <= made[1] == made[2] == made[3]  # at the second one PyTorch learns that lengths differ


@torch.no_grad()
def test_torch_compile_with_the_cache_compiles_again_at_every_step():
    torch._dynamo.reset()
    model, graphs, ids = random_model(num_hidden_layers=1), CompileCounter(), random_ids(2, 4)
    compiled, cache = torch.compile(model, backend=graphs), KVCache(model.config, 2)
    steps, made = [], [0]
    for i in range(4):
        steps.append(compiled(ids[:, i : i + 1], cache, attention_backend="sdpa"))
        made.append(graphs.frame_count)
    assert_within_budget(torch.cat(steps, 1), **uncached(model, ids))
    assert all(before < after for before, after in pairwise(made)), made

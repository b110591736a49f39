"""The cache by itself: what goes in comes out, its bytes are those allocated, and a refusal loses nothing."""

import pytest
import torch
from transformers import DynamicCache

from minillm import ModelConfig
from minillm.cache import KVCache
from minillm.measure import measure_memory

CONFIG = ModelConfig(
    vocab_size=9,
    hidden_size=24,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=20,
)


def new_tokens(batch, seqlen, seed=0):
    return torch.randn(2, batch, seqlen, 2, 4, generator=torch.Generator().manual_seed(seed)).unbind()


def fill(cache, seqlen, counts=None, seed=0):
    key, value = new_tokens(cache.batch_size, seqlen, seed)
    return [cache.update(key + layer, value - layer, layer, counts) for layer in range(3)]


def test_update_gives_what_that_of_transformers_gives_in_our_layout():
    ours, theirs = KVCache(CONFIG, 2, capacity=1), DynamicCache()
    for seqlen in (5, 1, 0, 1, 4):
        key, value = new_tokens(2, seqlen, seed=seqlen)
        for layer in range(3):
            mine = ours.update(key + layer, value - layer, layer)
            others = theirs.update((key + layer).transpose(1, 2), (value - layer).transpose(1, 2), layer)
            for x, y in zip(mine, others, strict=True):
                assert torch.equal(x, y.transpose(1, 2))
    assert ours.lengths == [theirs.get_seq_length()] * 2 == [11, 11]


def test_each_row_has_its_own_length():
    cache = KVCache(CONFIG, 3)
    fill(cache, 4, counts=[4, 0, 2])
    keys, values = fill(cache, 3, counts=[1, 3, 0], seed=1)[2]
    assert cache.lengths == [5, 3, 2]
    (key, value), (more_key, more_value) = new_tokens(3, 4), new_tokens(3, 3, seed=1)
    for row, (first, second) in enumerate([(4, 1), (0, 3), (2, 0)]):
        expected = torch.cat([key[row, :first], more_key[row, :second]]) + 2
        assert torch.equal(keys[row, : first + second], expected)
        expected = torch.cat([value[row, :first], more_value[row, :second]]) - 2
        assert torch.equal(values[row, : first + second], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_stated_bytes_are_those_that_are_allocated(dtype):
    report = measure_memory(KVCache, CONFIG, 3, capacity=7, dtype=dtype)
    assert report.result.nbytes == report.kept_bytes == 3 * 2 * 3 * 7 * 2 * 4 * dtype.itemsize


def test_the_seeds_64_mib_are_layers_times_kv_heads_times_head_dim_times_bytes_16384():
    shapes = {(8, 8, 64): 4, (16, 8, 64): 2, (4, 32, 64): 2}  # (layers, KV heads, head dim): bytes a number
    for (layers, heads, head_dim), size in shapes.items():
        config = ModelConfig(
            vocab_size=9,
            hidden_size=heads * head_dim,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
        dtype = torch.float32 if size == 4 else torch.bfloat16
        assert layers * heads * head_dim * size == 16_384
        assert KVCache(config, 1, dtype=dtype, device="meta").nbytes == 64 * 2**20


def test_it_grows_by_doubling_up_to_the_limit_and_keeps_every_token():
    cache, whole = KVCache(CONFIG, 2, capacity=3), KVCache(CONFIG, 2)
    capacities = []
    for step in range(20):
        grown, fixed = fill(cache, 1, seed=step), fill(whole, 1, seed=step)
        for mine, theirs in zip(grown, fixed, strict=True):
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
        capacities.append(cache.capacity)
        assert cache.nbytes == cache._buffer.untyped_storage().nbytes()
    assert sorted(set(capacities)) == [3, 6, 12, 20]


def test_past_the_limit_it_says_the_limit_and_loses_nothing():
    cache = KVCache(CONFIG, 2, capacity=4)
    fill(cache, 18)
    before, capacity = cache._buffer.clone(), cache.capacity
    with pytest.raises(ValueError, match="would hold 21 tokens, the model's max_position_embeddings is 20"):
        fill(cache, 3)
    assert cache.lengths == [18, 18] and cache.capacity == capacity and torch.equal(cache._buffer, before)
    fill(cache, 2)
    assert cache.lengths == [20, 20]


def test_truncate_forgets_the_end_of_each_row_and_a_fork_goes_its_own_way():
    cache = KVCache(CONFIG, 2, capacity=8)
    fill(cache, 6)
    fork = cache.fork()
    fork.truncate([2, 5])
    keys = fill(fork, 1, seed=1)[0][0]
    assert fork.lengths == [3, 6] and cache.lengths == [6, 6]
    key, new = new_tokens(2, 6)[0], new_tokens(2, 1, seed=1)[0]
    assert torch.equal(keys[0, :3], torch.cat([key[0, :2], new[0]]))
    assert torch.equal(cache.update(*new_tokens(2, 0), 0)[0], key)


def test_what_is_forgotten_is_cleared():
    cache = KVCache(CONFIG, 2, capacity=8)
    fill(cache, 6)
    cache.update(*new_tokens(2, 1), 0)  # one layer further than the others, as after a forward that was interrupted
    cache.truncate([2, 6])
    assert cache._buffer[:, :, 0, :2].all() and cache._buffer[:, :, 1, :6].all()
    assert not cache._buffer[:, :, 0, 2:].any() and not cache._buffer[:, :, 1, 6:].any()


def test_a_fork_made_in_inference_mode_can_be_written_to_outside_of_it():
    cache = KVCache(CONFIG, 1)
    with torch.inference_mode():
        fill(cache, 3)
        fork = cache.fork()
    fill(fork, 2)
    fork.truncate(1)
    assert (fork.lengths, cache.lengths) == ([1], [3])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: KVCache(CONFIG, 0), "batch_size is 0"),
        (lambda: KVCache(CONFIG, 1, capacity=21), "capacity is 21, wants 1 to .* 20"),
        (lambda: KVCache(CONFIG, 1).update(*new_tokens(2, 3), 0), r"key has shape \(2, 3, 2, 4\) .* want \(1, seqlen"),
        (lambda: KVCache(CONFIG, 1).update(*new_tokens(1, 3), -1), "layer_idx is -1, wants 0 to 2"),
        (lambda: KVCache(CONFIG, 1).update(*new_tokens(1, 3), 3), "layer_idx is 3, wants 0 to 2"),
        (lambda: fill(KVCache(CONFIG, 2), 1, counts=[5, 5]), r"counts is \[5, 5\], wants 0 to 1, for each of 2 rows"),
        (lambda: fill(KVCache(CONFIG, 2), 1, counts=[1, -1]), r"counts is \[1, -1\]"),
        (lambda: fill(KVCache(CONFIG, 2), 1, counts=[1]), r"counts is \[1\], wants 0 to 1, for each of 2 rows"),
        (lambda: fill(KVCache(CONFIG, 2), 1, counts=[]), r"counts is \[\]"),
        (lambda: KVCache(CONFIG, 2).truncate(1), r"lengths is 1, the rows hold \[0, 0\]"),
        (lambda: KVCache(CONFIG, 2).truncate([0]), r"lengths is \[0\]"),
        (lambda: KVCache(CONFIG, 2).truncate(-1), "lengths is -1"),
        (
            lambda: KVCache(CONFIG, 1, dtype=torch.float16).append(*new_tokens(1, 3), 0),
            "key is torch.float32 on cpu, the",
        ),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_lengths_of_a_truncation_are_the_callers_to_change_afterwards():
    cache = KVCache(CONFIG, 2)
    fill(cache, 6)
    lengths = torch.tensor([3, 4])
    cache.truncate(lengths)
    lengths -= 1
    assert cache.lengths == [3, 4] and all(type(length) is int for length in cache.lengths)

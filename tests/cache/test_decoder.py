"""The packed decoder: int8 at any width, threads, weights that change; and decoding under autocast."""

import copy

import pytest
import torch

from minillm.cache import KVCache
from minillm.decode import Decoder, int8_product, quantise, quantise_padded
from minillm.measure import assert_within_budget
from tests.cache.models import BACKENDS, random_ids, random_model, uncached

WIDTHS = [
    dict(hidden_size=40, intermediate_size=48, head_dim=10, vocab_size=97),
    dict(hidden_size=64, intermediate_size=100, vocab_size=97),
    dict(hidden_size=64, num_attention_heads=5, num_key_value_heads=1, head_dim=10),
    dict(hidden_size=33, intermediate_size=47, num_attention_heads=1, num_key_value_heads=1, head_dim=2),
]


@torch.no_grad()
@pytest.mark.parametrize("shape", WIDTHS, ids=str)
def test_int8_weights_of_any_width_give_the_logits_of_the_rounded_model(shape):
    """Of a row that 16 does not divide, torch's own product reads what lies behind: garbage, or the process's end."""
    model = random_model(**shape)
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            narrow, scale = quantise(module.weight)
            module.weight.copy_(narrow * scale[:, None].float())
    for rows in (1, 2, 3, 5):
        ids = random_ids(rows, 6, vocab_size=model.config.vocab_size)
        cache = KVCache(model.config, rows)
        model(ids[:, :5], cache)
        ours, exact = Decoder(model, "int8").step(ids[:, 5], cache), model(ids)[:, -1]
        assert (ours - exact).norm() < exact.norm() / 10
        assert (rounded(ids)[:, -1] - exact).norm() < exact.norm() / 10


@torch.no_grad()
def test_the_int8_product_is_within_the_budget_at_every_width():
    for width in range(1, 40):
        weight = torch.randn(24, width, generator=torch.Generator().manual_seed(width))
        packed, scale = quantise_padded(weight)
        assert packed.shape[1] % 16 == 0
        for rows in (1, 3):
            x = torch.randn(rows, width).bfloat16()
            restored = packed[:, :width] * scale[:, None].float()  # exact in fp32
            reference = x.double() @ restored.double().T
            naive = (x @ packed[:, :width].bfloat16().T) * scale
            assert_within_budget(int8_product(x, packed, scale), naive, reference)


@torch.no_grad()
def test_forks_of_a_decoder_step_at_the_same_time():
    model, ids = random_model(torch.float64), random_ids(4, 12)
    decoder, texts = Decoder(model), []
    for row in ids:
        cache = KVCache(model.config, 1, dtype=torch.float64)
        model(row[None, :1], cache)
        texts.append((decoder.fork(), cache, []))
    for position in range(1, 12):  # each one's logits are read only after the others have stepped
        results = [fork.step(row[position, None], cache) for row, (fork, cache, _) in zip(ids, texts, strict=True)]
        for logits, (_, _, steps) in zip(results, texts, strict=True):
            steps.append(logits)
        for row, logits in zip(ids, results, strict=True):
            expected = uncached(model, row[None, : position + 1])
            assert_within_budget(logits, expected["naive"][:, -1], expected["reference"][:, -1], multiple=8)


@torch.no_grad()
def test_a_packed_decoder_keeps_its_weights_when_the_model_changes():
    model, ids = random_model(), random_ids(2, 5)
    cache, decoder, other = KVCache(model.config, 2), Decoder(model), KVCache(model.config, 2)
    model(ids[:, :4], cache)
    model(ids[:, :4], other)
    before = Decoder(model).step(ids[:, 4], other).clone()
    for parameter in model.parameters():
        parameter.add_(1)
    assert torch.equal(decoder.step(ids[:, 4], cache), before)


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", BACKENDS.values(), ids=list(BACKENDS))
def test_decoding_under_autocast_is_as_close_as_without_a_cache(options, cache_dtype):
    model, ids = random_model(), random_ids(2, 9)
    expected = uncached(model, ids)["reference"]
    with torch.autocast("cpu", torch.bfloat16):
        naive = model(ids, use_flash_attention=False)
        cache = KVCache(model.config, 2, dtype=cache_dtype)
        parts = [model(part, cache, **options) for part in ids.split([4, 3, 1, 1], dim=1)]
    assert_within_budget(torch.cat(parts, 1), naive, expected, multiple=8)


@torch.no_grad()
def test_a_cache_that_cannot_hold_what_autocast_computes_is_refused():
    model, ids = random_model(), random_ids(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="kv_cache has dtype torch.float16, wants torch.bfloat16"):
            model(ids, KVCache(model.config, 1, dtype=torch.float16))
        with pytest.raises(ValueError, match="kv_cache has dtype torch.bfloat16, wants torch.float64"):
            random_model(torch.float64)(ids, KVCache(model.config, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="kv_cache has dtype torch.bfloat16, wants torch.float32"):
        model(ids, KVCache(model.config, 1, dtype=torch.bfloat16))


@torch.no_grad()
def test_a_packed_step_computes_in_its_weights_dtype_under_autocast():
    model, ids = random_model(), random_ids(2, 5)
    caches = [KVCache(model.config, 2), KVCache(model.config, 2)]
    for cache in caches:
        model(ids[:, :4], cache)
    outside = Decoder(model).step(ids[:, 4], caches[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Decoder(model).step(ids[:, 4], caches[1]), outside)

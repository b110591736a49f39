"""Llama 3, Mistral, Qwen2 and Qwen3 in MiniLLM: the logits of transformers in every way that we compute them.

"dynamic" RoPE turns all keys of a call by the length at that call, and a cache keeps them so: there the same calls
are compared. Everywhere else one answer of transformers, to the whole text, judges every way.
"""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from minillm import KVCache, MiniLLM, ModelConfig
from minillm.checkpoint import from_transformers, to_transformers
from minillm.config import RopeScaling
from minillm.decode import Decoder, quantise
from minillm.generate import TextGenerator
from minillm.measure import assert_within_budget
from minillm.model import SelfAttention
from minillm.rope import apply_rope, rotary_tables, shift_rope
from tests.families import FAMILIES, LENGTH, ORIGINAL, answers, build, forget_lengths, in_dtype, tokens

BACKENDS = ({}, {"flash_block_size": 7}, {"use_flash_attention": False}, {"attention_backend": "sdpa"})
every_family = pytest.mark.parametrize("name", FAMILIES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def calls_of(name, *calls):
    """How transformers has to be called so that its answer judges ours, which was called so."""
    return calls if name == "dynamic" else ()


def check_logits(name, dtype=torch.float32, backends=BACKENDS):
    theirs, ids = build(name, dtype), tokens(2, LENGTH)
    ours = from_transformers(theirs)
    expected = answers(theirs, ids), answers(in_dtype(theirs, torch.float64), ids)
    for options in backends:
        assert_within_budget(ours(ids, **options), *expected, multiple=8)
        last = ours(ids, last_token_only=True, **options)
        assert_within_budget(last, *(logits[:, -1:] for logits in expected), multiple=8)


def check_every_cut(name):
    theirs, ids = build(name), tokens(2, LENGTH)
    ours, exact = from_transformers(theirs), in_dtype(theirs, torch.float64)
    for cut in range(1, LENGTH):
        calls = calls_of(name, cut, LENGTH - cut)
        if cut == 1 or calls:
            expected = answers(theirs, ids, *calls), answers(exact, ids, *calls)
        cache = KVCache(ours.config, 2, capacity=8)
        pieces = [ours(piece, cache) for piece in ids.split([cut, LENGTH - cut], dim=1)]
        assert_within_budget(torch.cat(pieces, 1), *expected, multiple=8)


def check_decoder(name, dtype=torch.float32, steps=8):
    """Rows of different lengths, padded, in the prefill; then each step for all of them."""
    theirs, prompts = build(name, dtype), (3, LENGTH - steps, ORIGINAL - 2)
    ours, exact = from_transformers(theirs), in_dtype(theirs, torch.float64)
    rows = [tokens(1, prompt + steps, seed=row) for row, prompt in enumerate(prompts)]
    for side in ("left", "right"):
        longest = max(prompts)
        ids, mask = tokens(3, longest, seed=9), torch.zeros(3, longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            place = slice(longest - prompt, None) if side == "left" else slice(prompt)
            ids[row, place], mask[row, place] = rows[row][0, :prompt], True
        cache, decoder = KVCache(ours.config, 3, capacity=8, dtype=dtype), Decoder(ours)
        padded = ours(ids, cache, token_mask=mask)
        new = torch.stack([row[0, prompt:] for row, prompt in zip(rows, prompts, strict=True)], 1)  # (steps, rows)
        stepped = [decoder.step(token_ids, cache).clone() for token_ids in new]
        for row, prompt in enumerate(prompts):
            calls = calls_of(name, prompt, *[1] * steps)
            mine = torch.cat([padded[row, mask[row]], torch.stack([step[row] for step in stepped])])[None]
            expected = (answers(model, rows[row], *calls) for model in (theirs, exact))
            assert_within_budget(mine, *expected, multiple=8)


def check_int8(name, length=ORIGINAL + 6):
    """Against transformers with the rounded weights: then only the multiplication in bf16 differs."""
    theirs = build(name)
    rounded = with_rounded_weights(theirs)
    decoder = Decoder(from_transformers(theirs), "int8")
    cache, rows = KVCache(decoder.config, 2, capacity=4), [tokens(1, length, seed=row) for row in range(2)]
    mine: list[list[torch.Tensor]] = [[], []]
    lengths = [0, 0]
    for step in range(length):
        if step == 4:  # from here on the second row is shorter
            cache.truncate([4, 1])
            lengths[1], mine[1] = 1, mine[1][:1]
        ids = torch.stack([row[0, done] for row, done in zip(rows, lengths, strict=True)])
        for row, logits in enumerate(decoder.step(ids, cache).clone()):
            mine[row].append(logits)
            lengths[row] += 1
    for row, logits in enumerate(mine):
        ids, calls = rows[row][:, : lengths[row]], calls_of(name, *[1] * lengths[row])
        naive, exact = (answers(in_dtype(rounded, dtype), ids, *calls) for dtype in (torch.bfloat16, torch.float64))
        assert_within_budget(torch.stack(logits)[None], naive, exact, multiple=8)


@torch.no_grad()
def with_rounded_weights(theirs):
    """transformers' model with the matrices that `Decoder(…, "int8")` stores, norms' weights multiplied into them."""
    model = copy.deepcopy(theirs)
    model.lm_head = nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)  # no longer tied
    model.lm_head.weight.copy_(theirs.lm_head.weight)
    model.config.tie_word_embeddings = False
    one = nn.Parameter(torch.ones(1))
    pairs = [(model.model.norm, [model.lm_head])]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
        pairs += [(None, [attention.o_proj]), (None, [mlp.down_proj])]
    for norm, linears in pairs:
        for linear in linears:
            values, scale = quantise(linear.weight * (one if norm is None else norm.weight))
            linear.weight.copy_(values * scale[:, None].float())
        if norm is not None:
            norm.weight.fill_(1)
    return model


@DTYPES
@every_family
@torch.no_grad()
def test_logits_equal_those_of_transformers(name, dtype):
    check_logits(name, dtype)


@every_family
@torch.no_grad()
def test_logits_are_equal_with_the_cache_at_every_cut(name):
    check_every_cut(name)


@DTYPES
@every_family
@torch.no_grad()
def test_padded_rows_and_the_packed_step_equal_each_row_alone(name, dtype):
    check_decoder(name, dtype)


@every_family
@torch.no_grad()
def test_the_int8_step_equals_transformers_with_the_rounded_weights(name):
    check_int8(name)


@every_family
@torch.no_grad()
def test_a_model_comes_back_as_its_own_family_with_the_same_weights_and_ids(name):
    theirs, ids = build(name, torch.bfloat16), tokens(2, LENGTH)
    back = to_transformers(from_transformers(theirs))
    family = "LlamaForCausalLM" if name == "mistral, no window" else type(theirs).__name__
    assert type(back).__name__ == family
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(weight, theirs.state_dict()[key]) for key, weight in back.state_dict().items())
    assert torch.equal(answers(back, ids), answers(theirs, ids))
    for config in (back.config, back.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], 0)
    assert from_transformers(back).config == from_transformers(theirs).config


@every_family
@torch.no_grad()
def test_greedy_text_is_that_of_generate_and_ends_where_it_ends(name):
    theirs, prompts = build(name), tokens(6, 12, seed=1)
    ours = from_transformers(theirs)
    texts = TextGenerator(ours).generate(prompts, 16, 0.0, stop_tokens=ours.config.eos_token_ids)
    for prompt, text in zip(prompts, texts, strict=True):
        forget_lengths(theirs)
        written = theirs.generate(prompt[None], max_new_tokens=16, do_sample=False)[0, 12:].tolist()
        assert text == (written[:-1] if written[-1] in (2, 5) else written)


def windows_one_longer(patch):
    window = ModelConfig.window
    patch.setattr(ModelConfig, "window", lambda self, layer: (window(self, layer) or -1) + 1 or None)


def window_of_the_step_one_longer(patch):
    step_window = Decoder._window

    def longer(self, slots):
        config = self.config
        self.config = dataclasses.replace(config, sliding_window=(config.sliding_window or LENGTH) + 1)
        result = step_window(self, slots)
        self.config = config
        return result

    patch.setattr(Decoder, "_window", longer)


def window_in_every_layer(patch):
    patch.setattr(ModelConfig, "window", lambda self, layer: self.sliding_window)


def no_attention_factor(patch):
    patch.setattr(RopeScaling, "attention_factor", property(lambda self: 1.0, lambda self, value: None), raising=False)


def norms_after_rope(patch):
    def project(self, x, cos, sin):
        q, k, v = (getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        return self.q_norm(apply_rope(q, cos, sin)), self.k_norm(apply_rope(k, cos, sin)), v

    patch.setattr(SelfAttention, "project", project)


def norms_exchanged(patch):
    def project(self, x, cos, sin):
        q, k, v = (getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.head_dim)) for name in "qkv")
        return apply_rope(self.k_norm(q), cos, sin), apply_rope(self.q_norm(k), cos, sin), v

    patch.setattr(SelfAttention, "project", project)


def rope_not_scaled(patch):
    patch.setattr("minillm.model.rotary_tables", lambda p, d, theta, *rest: rotary_tables(p, d, theta))
    patch.setattr("minillm.decode.rotary_tables", lambda p, d, theta, *rest: rotary_tables(p, d, theta))


def dynamic_by_the_limit(patch):
    limit = torch.tensor([4 * ORIGINAL])
    for module in ("model", "decode"):
        patch.setattr(f"minillm.{module}.rotary_tables", lambda p, d, t, s, n: rotary_tables(p, d, t, s, limit))


def step_without_bias(patch):
    patch.setattr(Decoder, "_qkv_bias", lambda self, attention: None)


def step_without_norms(patch):
    patch.setattr(Decoder, "_qk_norm", lambda self, attention: None)


@pytest.mark.parametrize(
    "plant, name, checks",
    [
        (windows_one_longer, "mistral", (check_logits, check_every_cut, check_decoder)),
        (windows_one_longer, "qwen2, windows", (check_logits, check_every_cut, check_decoder)),
        (window_of_the_step_one_longer, "mistral", (check_decoder, check_int8)),
        (window_of_the_step_one_longer, "qwen3, windows", (check_decoder, check_int8)),
        (window_in_every_layer, "qwen2, windows", (check_logits, check_every_cut, check_decoder, check_int8)),
        (no_attention_factor, "yarn", (check_logits, check_every_cut, check_decoder, check_int8)),
        (norms_after_rope, "qwen3", (check_logits, check_every_cut, check_decoder)),
        (norms_exchanged, "qwen3", (check_logits, check_every_cut, check_decoder)),
        (rope_not_scaled, "llama3", (check_logits, check_every_cut, check_decoder, check_int8)),
        (rope_not_scaled, "linear", (check_logits, check_every_cut, check_decoder, check_int8)),
        (rope_not_scaled, "dynamic", (check_logits, check_every_cut, check_decoder, check_int8)),
        (dynamic_by_the_limit, "dynamic", (check_logits, check_every_cut, check_decoder, check_int8)),
        (step_without_bias, "qwen2", (check_decoder, check_int8)),
        (step_without_norms, "qwen3", (check_decoder, check_int8)),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
@torch.no_grad()
def test_a_planted_bug_is_found_by_each_check_that_it_touches(plant, name, checks, monkeypatch):
    with monkeypatch.context() as patch:
        plant(patch)
        for check in checks:
            with pytest.raises(AssertionError, match="over"):
                check(name)


@every_family
def test_a_rotated_key_can_be_moved_with_scaled_rope_too(name):
    config = from_transformers(build(name)).config
    keys = torch.randn(1, 4, 2, config.head_dim, dtype=torch.float64)
    options = config.rope_theta, config.rope_scaling
    if name == "dynamic":
        with pytest.raises(ValueError, match="scaling is 'dynamic'.*compute the keys again"):
            shift_rope(keys, 3, *options)
        with pytest.raises(ValueError, match="lengths is None"):
            rotary_tables(torch.arange(3), config.head_dim, *options)
        return
    at_0, at_9 = (rotary_tables(torch.arange(p, p + 4), config.head_dim, *options) for p in (0, 9))
    assert_within_budget(
        shift_rope(apply_rope(keys, *at_0), 9, *options).float(),
        apply_rope(keys.float(), *at_9),
        apply_rope(keys, *at_9),
        multiple=16,
    )


@torch.no_grad()
def test_dynamic_keeps_each_row_to_its_own_length():
    model = from_transformers(build("dynamic"))
    short, long = tokens(1, 9), tokens(1, LENGTH, seed=1)
    both = torch.cat([torch.nn.functional.pad(short, (0, LENGTH - 9)), long])
    mask = torch.ones_like(both).bool()
    mask[0, 9:] = False
    torch.testing.assert_close(model(both, token_mask=mask)[0, :9], model(short)[0], rtol=1e-4, atol=1e-4)
    assert model.config.max_position_embeddings == 4 * ORIGINAL
    assert to_transformers(model).config.max_position_embeddings == ORIGINAL


@torch.no_grad()
def test_the_steps_rotations_grow_with_the_text():
    config = dataclasses.replace(ModelConfig.small(), max_position_embeddings=2000, num_hidden_layers=1)
    model, ids = MiniLLM(config).eval(), torch.randint(1536, (1, 1101))
    cache, decoder = KVCache(config, 1, capacity=1101), Decoder(model)
    model(ids[:, :1100], cache)
    expected = model(ids)[:, -1]
    double = copy.deepcopy(model).double()(ids)[:, -1]
    assert_within_budget(decoder.step(ids[:, 1100], cache), expected, double, multiple=8)

"""MiniLLM against transformers' Llama with the same weights, and its own promises."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minillm import Configs, MiniLLM, ModelConfig
from minillm.attention import naive_attention
from minillm.checkpoint import from_transformers, load_checkpoint, save_checkpoint, to_transformers
from minillm.measure import assert_within_budget
from minillm.rope import apply_rope, rotary_tables

ODD_SHAPES = {
    "mha": dict(num_attention_heads=4, num_key_value_heads=4),
    "gqa": dict(num_attention_heads=6, num_key_value_heads=2, hidden_size=96),
    "mqa": dict(num_attention_heads=5, num_key_value_heads=1, hidden_size=65, head_dim=22),
    "tied": dict(tie_word_embeddings=True),
    "wide heads": dict(head_dim=48, num_key_value_heads=2),
    "another theta": dict(rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, rms_norm_eps=1e-6),
    "one layer": dict(num_hidden_layers=1, intermediate_size=31),
}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,  # logits of a size that matters
    )
    return LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()


def tokens(seqlen=61, batch=2, vocab_size=97) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, seqlen), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", ODD_SHAPES.values(), ids=ODD_SHAPES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(changes, dtype):
    theirs = llama(**changes)
    reference = theirs.double()(tokens()).logits  # transformers itself, in float64
    theirs = theirs.to(dtype)
    ours = from_transformers(theirs)
    for options in ({}, {"flash_block_size": 7}, {"use_flash_attention": False}, {"attention_backend": "sdpa"}):
        assert_within_budget(ours(tokens(), **options), theirs(tokens()).logits, reference, multiple=8)


@torch.no_grad()
def test_weights_come_back_from_transformers_unchanged():
    for changes in ODD_SHAPES.values():
        theirs = llama(**changes)
        back = to_transformers(from_transformers(theirs))
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), theirs.parameters(), strict=True))
        torch.testing.assert_close(back(tokens()).logits, theirs(tokens()).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(attention_bias=True), "attention_bias True"),
        (dict(mlp_bias=True), "mlp_bias True"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (
            dict(
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                    "factor": 2.0,
                }
            ),
            "rope_type 'longrope'",
        ),
    ],
)
def test_a_llama_that_we_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(llama(**changes))


def test_gradients_reach_every_parameter_through_the_tiled_attention():
    model = from_transformers(llama())
    model(tokens()).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_attention_inputs_of_the_lessons_are_those_of_the_model():
    model = from_transformers(llama(**ODD_SHAPES["gqa"])).double()
    seen = []
    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens(), use_flash_attention=False)
    for (q, k, v), out in zip(model.queries_keys_values(tokens()), seen, strict=False):
        assert (q.shape, k.shape, v.shape) == ((2, 61, 6, 16), (2, 61, 2, 16), (2, 61, 2, 16))
        torch.testing.assert_close(naive_attention(q, k, v, causal=True).flatten(-2), out)


def test_a_checkpoint_survives_the_disk(tmp_path):
    model = from_transformers(llama(**ODD_SHAPES["tied"]))
    tokenizer = load_checkpoint()[1]
    save_checkpoint(tmp_path, model, tokenizer)
    loaded, text = load_checkpoint(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert text.encode("My hobby is chess.").ids == tokenizer.encode("My hobby is chess.").ids
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".yaml", ".json"}


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint there; shipped ones are small"):
        load_checkpoint(tmp_path)


def test_presets_differ_and_configs_is_model_config():
    assert Configs is ModelConfig
    sizes = [getattr(Configs, name)() for name in ("small", "medium", "large")]
    assert [config.hidden_size for config in sizes] == [128, 512, 1024]


def test_a_config_survives_yaml_and_refuses_unknown_names(tmp_path):
    path = tmp_path / "config.yaml"
    ModelConfig.small().to_yaml(path)
    assert ModelConfig.from_yaml(path) == ModelConfig.small()
    path.write_text("vocab_size: 5\nnum_heads: 3\n")
    with pytest.raises(ValueError, match="unknown entries: num_heads"):
        ModelConfig.from_yaml(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_key_value_heads=3), "num_key_value_heads is 3, not a divisor of num_attention_heads 4"),
        (dict(hidden_size=130), "hidden_size 130 is not a multiple"),
        (dict(head_dim=33), "head_dim is 33"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    shape = dict(
        vocab_size=9,
        hidden_size=128,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(shape | changes))


def test_bad_calls_of_the_model_say_what_is_wrong():
    model = MiniLLM(ModelConfig.small())
    with pytest.raises(ValueError, match=r"input_ids has shape \(3,\)"):
        model(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="600 tokens a row"):
        model(tokens(seqlen=600))
    with pytest.raises(ValueError, match="ids from 0 to 5000"):
        model(torch.tensor([[0, 5000]]))
    assert model(tokens(seqlen=0)).shape == (2, 0, 1536)


def test_rope_turns_by_the_difference_of_positions_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(position_q, position_k):
        turned = (apply_rope(x, *rotary_tables(torch.tensor([p]), 16)) for x, p in ((q, position_q), (k, position_k)))
        return torch.mul(*turned).sum().item()

    assert abs(score(7, 3) - score(104, 100)) < 1e-5
    assert abs(score(-2, -6) - score(7, 3)) < 1e-5
    assert abs(score(7, 3) - score(7, 4)) > 1e-3

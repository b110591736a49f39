"""Models in and out of transformers: what is refused by name, contradicting weights, and the special ids."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minillm import MiniLLM, ModelConfig
from minillm.checkpoint import FAMILIES, from_transformers, load_checkpoint, save_checkpoint, to_transformers
from minillm.config import RopeScaling
from minillm.corpus import BOT, user_turn
from minillm.measure import assert_within_budget
from tests.families import SHAPE, answers, build, in_dtype, tokens

SMALL = SHAPE | dict(num_hidden_layers=1, n_layer=1, n_head=4, n_embd=64, head_dim=16, ffn_dim=96)


def test_every_other_causal_family_is_refused_by_its_model_type():
    others = {CONFIG_MAPPING[name].model_type for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - FAMILIES.keys()
    assert len(others) > 100
    for model_type in others:
        hf_model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        with pytest.raises(
            ValueError, match=f"model_type '{model_type}', MiniLLM wants one of llama, mistral, qwen2, "
        ):
            from_transformers(hf_model)


@pytest.mark.parametrize("family", ["GPT2", "Gemma", "Phi3", "Mixtral", "Olmo2", "SmolLM3", "Granite", "StableLm"])
def test_a_model_of_another_family_is_refused_by_its_model_type(family):
    config_class = getattr(transformers, f"{family}Config")
    fields = config_class().to_dict().keys() | {"num_key_value_heads"}
    config = config_class(**{name: value for name, value in SMALL.items() if name in fields})
    with pytest.raises(ValueError, match=f"hf_model has model_type '{config.model_type}'"):
        from_transformers(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("class_name", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_a_llama_without_next_token_logits_is_refused(class_name):
    theirs = getattr(transformers, class_name)(transformers.LlamaConfig(**SHAPE))
    with pytest.raises(
        ValueError, match=f"hf_model is a {class_name}, MiniLLM wants the class that ends in ForCausalLM"
    ):
        from_transformers(theirs)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(ValueError, match="hf_model has model_type None"):
        from_transformers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("Llama", dict(attention_bias=True), "attention_bias True, MiniLLM wants False for model_type 'llama'"),
        ("Qwen3", dict(attention_bias=True), "attention_bias True, MiniLLM wants False for model_type 'qwen3'"),
        ("Mistral", dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (
            "Qwen2",
            dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "turns": 3}),
            "rope_parameters of type 'linear' has unknown entries: turns",
        ),
    ],
)
def test_a_field_that_changes_logits_is_refused_by_name(family, changes, message):
    config = getattr(transformers, f"{family}Config")(**(SHAPE | {"head_dim": 16} | changes))
    with pytest.raises(ValueError, match=message):
        from_transformers(getattr(transformers, f"{family}ForCausalLM")(config))


def test_dropout_is_refused_in_training_mode_and_the_cure_works():
    theirs = build("llama").train()
    theirs.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout 0.1 .* call hf_model.eval\(\) before"):
        from_transformers(theirs)
    assert not from_transformers(theirs.eval()).training


def test_weights_of_several_dtypes_are_refused_and_the_cure_works():
    theirs = build("llama").bfloat16()
    theirs.lm_head.float()
    with pytest.raises(ValueError, match="weights in torch.bfloat16, torch.float32: give all one dtype"):
        from_transformers(theirs)
    assert from_transformers(theirs.to(torch.float32)).norm.weight.dtype == torch.float32


def test_quantised_weights_are_refused():
    theirs = build("llama")
    theirs.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match="weights in torch.uint8: load it without a quantization_config"):
        from_transformers(theirs)


def test_weights_beside_those_of_the_family_are_refused():
    theirs = build("llama")
    theirs.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(64, 2, bias=False)
    with pytest.raises(
        ValueError, match="other weights than MiniLLM, such as 'layers.0.self_attn.q_proj.lora_A.weight'"
    ):
        from_transformers(theirs)


@torch.no_grad()
def test_two_matrices_in_a_file_whose_config_says_tied_are_both_used(tmp_path):
    build("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 20)
    assert theirs.config.tie_word_embeddings and theirs.lm_head.weight is not theirs.model.embed_tokens.weight
    ours = from_transformers(theirs)
    assert not ours.config.tie_word_embeddings
    assert_within_budget(ours(ids), answers(theirs, ids), answers(in_dtype(theirs, torch.float64), ids), multiple=8)
    assert torch.equal(answers(to_transformers(ours), ids), answers(theirs, ids))


def test_a_checkpoint_whose_output_matrix_contradicts_its_config_is_refused_and_the_cures_work(tmp_path):
    model, tokenizer = load_checkpoint()
    save_checkpoint(tmp_path, model, tokenizer)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    other = weights["embed_tokens.weight"] + 1
    save_file(weights | {"lm_head.weight": other}, path)
    with pytest.raises(ValueError, match="lm_head.weight that is not embed_tokens.weight.*tie_word_embeddings is True"):
        load_checkpoint(tmp_path)
    dataclasses.replace(model.config, tie_word_embeddings=False).to_yaml(tmp_path / "config.yaml")
    assert torch.equal(load_checkpoint(tmp_path)[0].lm_head.weight, other)
    model.config.to_yaml(tmp_path / "config.yaml")
    save_file(weights, path)
    assert torch.equal(load_checkpoint(tmp_path)[0].lm_head.weight, weights["embed_tokens.weight"])


@pytest.mark.parametrize(
    "in_config, in_generation_config, wanted",
    [(2, ..., (2,)), ([2, 5], ..., (2, 5)), (2, [7, 8], (7, 8)), (None, ..., ()), (2, None, ()), (None, 0, (0,))],
)
def test_end_of_sequence_is_what_generate_goes_by(in_config, in_generation_config, wanted):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SHAPE | {"eos_token_id": in_config})))
    if in_generation_config is not ...:
        theirs.generation_config.eos_token_id = in_generation_config
    ours = from_transformers(theirs)
    assert ours.config.eos_token_ids == wanted
    assert (ours.config.bos_token_id, ours.config.pad_token_id) == (1, 0)
    back = to_transformers(ours)
    expected = None if not wanted else wanted[0] if len(wanted) == 1 else list(wanted)
    assert back.config.eos_token_id == back.generation_config.eos_token_id == expected


def test_a_model_without_special_ids_does_not_get_those_of_llama():
    config = dataclasses.replace(ModelConfig.small(), eos_token_ids=(), pad_token_id=None)
    theirs = to_transformers(MiniLLM(config))
    for source in (theirs.config, theirs.generation_config):
        assert (source.bos_token_id, source.eos_token_id, source.pad_token_id) == (None, None, None)


def test_the_exported_checkpoint_stops_where_ours_does():
    model, tokenizer = load_checkpoint()
    prompt = torch.tensor([tokenizer.encode(user_turn(["My name is Ann. What is my name?"]) + BOT).ids])
    written = to_transformers(model).generate(prompt, max_new_tokens=30, do_sample=False)[0, prompt.shape[1] :]
    assert written.tolist().index(3) == len(written) - 1 < 29


def test_every_option_survives_yaml_and_an_old_file_is_still_read(tmp_path):
    path = tmp_path / "config.yaml"
    config = dataclasses.replace(
        ModelConfig.small(),
        rope_scaling=RopeScaling("yarn", 4.0, 512, attention_factor=0.7),
        sliding_window=7,
        layer_types=("full_attention", "sliding_attention") * 2,
        attention_bias=True,
        qk_norm=True,
        eos_token_ids=[2, 5],
        bos_token_id=1,
    )
    assert config.eos_token_ids == (2, 5) and hash(config)
    config.to_yaml(path)
    assert ModelConfig.from_yaml(path) == config
    old = [line for line in path.read_text().splitlines() if line.split(":")[0] in OLD_FIELDS]
    path.write_text("\n".join(old))
    assert ModelConfig.from_yaml(path) == dataclasses.replace(ModelConfig.small(), eos_token_ids=(), pad_token_id=None)
    path.write_text("\n".join([*old, "rope_scaling: {rope_type: linear, factor: 2, speed: 3}"]))
    with pytest.raises(ValueError, match="rope_scaling has unknown entries: speed"):
        ModelConfig.from_yaml(path)


OLD_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
OLD_FIELDS = OLD_FIELDS[: OLD_FIELDS.index("tie_word_embeddings") + 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sliding_window=0), "sliding_window is 0, wants 1 or more"),
        (dict(sliding_window=3, layer_types=["sliding_attention"]), "layer_types is .* for each of 4 layers"),
        (dict(sliding_window=3, layer_types=["chunked_attention"] * 4), "layer_types is .*wants 'full_attention' or"),
        (dict(layer_types=["sliding_attention"] * 4), "sliding_window is None: give both or neither"),
        (dict(rope_scaling=dict(rope_type="ntk", factor=2.0)), "rope_type is 'ntk', wants one of linear, dynamic"),
        (dict(rope_scaling=dict(rope_type="linear", factor=0.5)), "factor is 0.5, wants 1 or more"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "original_max_position_embeddings is 0"),
        (
            dict(rope_scaling=RopeScaling("dynamic", 2.0, 9), head_dim=2),
            "head_dim is 2, rope_scaling 'dynamic' wants 4",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ModelConfig.small(), **changes)
    with pytest.raises(ValueError, match="low_freq_factor is 4.0 and high_freq_factor 4.0"):
        RopeScaling("llama3", 2.0, 9, low_freq_factor=4.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(qk_norm=True, attention_bias=True), "config has qk_norm and attention_bias"),
        (
            dict(sliding_window=3, layer_types=["full_attention", "sliding_attention"] * 2),
            "a window in some layers only",
        ),
    ],
)
def test_options_of_no_family_are_refused_on_the_way_out(changes, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(MiniLLM(dataclasses.replace(ModelConfig.small(), **changes)))


def test_the_longest_sequence_can_be_given():
    assert from_transformers(build("linear")).config.max_position_embeddings == 64
    assert from_transformers(build("linear"), max_position_embeddings=256).config.max_position_embeddings == 256


def test_an_exported_bf16_model_keeps_the_frequencies_of_rope_in_fp32():
    theirs = to_transformers(from_transformers(build("llama3", torch.bfloat16)))
    assert theirs.dtype == torch.bfloat16 and theirs.model.rotary_emb.inv_freq.dtype == torch.float32

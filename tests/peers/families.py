"""Tiny random models of every causal family that transformers can build from a config."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: dict[str, Any] = {  # whatever a family calls them
    **dict.fromkeys(("vocab_size", "n_vocab"), 97),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "n_embed", "emb_dim", "embedding_size", "dim", "dim_model"), 64
    ),
    **dict.fromkeys(("word_embed_proj_dim", "d_embed", "cross_attention_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_inner", "dff", "dim_ff"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "block_ff_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 5),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("v_head_dim",), 12),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_n_groups", "n_groups"), 4),
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(
        ("dropout", "attention_dropout", "activation_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0
    ),
    **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "embedding_dropout"), 0.0
    ),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),  # so that attention matters to the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "use_sliding_window": True,
    "use_mamba_kernels": False,
}
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1)  # twice the hidden size
OWN: dict[str, dict[str, Any]] = {  # what the rule for all families does not find
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "dots3_note_text": dict(num_key_value_heads=4),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2),
    ),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=128),
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        intermediate_size=[96, 96],
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=5),
    "granitemoehybrid": MAMBA | dict(layer_types=["mamba", "attention"]),
    "hrm_text": dict(initializer_range=0.02),  # its layers run again and again: larger weights are chaos
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=16, n_groups=1),
    "reformer": dict(axial_pos_embds_dim=(32, 32), axial_pos_shape=(4, 5), is_decoder=True),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"], attention_window_size=5, lru_width=64),
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}
LARGEST = 20_000_000  # parameters: what is larger is not tiny, and takes seconds


def families() -> list[str]:
    """The names of all causal families of the transformers that is installed."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    """A config of the family with every size made small, and one layer of each of its kinds at least."""
    kind = transformers.CONFIG_MAPPING[family]
    return _shrink(kind, OWN.get(family, {}))


def _shrink(kind: Any, own: dict[str, Any]) -> Any:
    default = kind()
    other_names = getattr(kind, "attribute_map", {})
    names = {*vars(default), *other_names}
    settable = {name for name in names if not isinstance(getattr(kind, other_names.get(name, name), None), property)}
    sizes = {name: size for name, size in SIZES.items() if name in settable - {*other_names}}
    sizes = {name: size for name, size in sizes.items() if vars(default).get(name) != size}
    if "kv_lora_rank" in names:  # DeepSeek's latent attention: every head has its keys, and RoPE turns a part of each
        sizes |= {name: size for name, size in dict(num_key_value_heads=4, head_dim=8).items() if name in sizes}
    layers = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if layers and "layer_types" in settable:
        sizes["layer_types"] = (layers * 2)[: max(2, len(layers))]
        for name in ("num_hidden_layers", "n_layer"):
            if name in sizes:
                sizes[name] = len(sizes["layer_types"])
    for name, sub in vars(default).items():
        if isinstance(sub, transformers.PreTrainedConfig):
            sizes[name] = _shrink(type(sub), OWN.get(sub.model_type, {})).to_dict()
    return kind(**(sizes | own))


def build(config: Any, implementation: str) -> Any:
    """The model of a config with random weights, the same ones at every call.

    Raises:
        ValueError: where it has more than `LARGEST` parameters.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "sink" in name or "bias" in name:  # zero at first, and a fault in them would not be seen
            weight.data.normal_(0, 0.3, generator=generator)
    return model.eval()

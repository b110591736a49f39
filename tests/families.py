"""Tiny random models of the families that people load, as transformers builds them, and what transformers answers."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

ORIGINAL, LENGTH = 16, 40  # tokens: the context that RoPE is stretched from, and the texts of the tests
SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,  # logits of a size that matters
    bos_token_id=1,
    eos_token_id=[2, 5],
    pad_token_id=0,
)


def rope(rope_type: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4} | values}


STRETCHED = {"original_max_position_embeddings": ORIGINAL}
WINDOW = dict(use_sliding_window=True, sliding_window=5)
FAMILIES = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **STRETCHED)),
    "llama3, tied": (
        "Llama",
        rope("llama3", low_freq_factor=0.5, high_freq_factor=6.0, **STRETCHED) | {"tie_word_embeddings": True},
    ),
    "linear": ("Llama", rope("linear")),
    "dynamic": ("Llama", rope("dynamic") | {"max_position_embeddings": ORIGINAL}),
    "yarn": ("Llama", rope("yarn", **STRETCHED)),
    "yarn, all given": (
        "Llama",
        rope("yarn", attention_factor=0.7, beta_fast=3.0, beta_slow=0.5, truncate=False, **STRETCHED),
    ),
    "yarn, mscale": ("Llama", rope("yarn", mscale=2.0, mscale_all_dim=0.5, **STRETCHED)),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, windows": ("Qwen2", WINDOW | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, windows": ("Qwen3", WINDOW | {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3, all windows": ("Qwen3", WINDOW | {"head_dim": 16, "max_window_layers": 0} | rope("linear")),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of transformers with random weights, biases and norms included; its values fit into bf16."""
    family, changes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.data = parameter.data.bfloat16().float()
    return in_dtype(model, dtype)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in another precision, with the frequencies of RoPE in fp32, as `from_pretrained(…, dtype=…)` has them.

    Those of transformers' norms that would compute in fp32 even in a float64 model are made to compute in float64.
    """
    model = copy.deepcopy(model).to(dtype)
    if dtype == torch.float64:
        for module in list(model.modules()):
            for name, norm in module.named_children():
                if name.endswith("norm"):
                    exact = torch.nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                    exact.weight = norm.weight
                    setattr(module, name, exact)
    forget_lengths(model)
    return model


def forget_lengths(model: PreTrainedModel) -> None:
    """In transformers, "dynamic" also remembers the longest text of earlier calls."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


@torch.no_grad()
def answers(model: PreTrainedModel, ids: Tensor, *calls: int) -> Tensor:
    """Logits of transformers, (batch, seqlen, vocab): all tokens at once, or so many a call with its own cache."""
    forget_lengths(model)
    past = DynamicCache(config=model.config) if calls else None
    pieces = ids.split(list(calls), dim=1) if calls else [ids]
    return torch.cat([model(piece, past_key_values=past, use_cache=bool(calls)).logits for piece in pieces], 1)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(seed))

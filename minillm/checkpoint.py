"""Weights in and out: the checkpoint that ships with the course, and transformers' Llama. Files are safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from minillm.config import ModelConfig
from minillm.model import MiniLLM

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SHIPPED = Path(__file__).parent / "checkpoints"


def load_checkpoint(folder: str | Path = "small") -> tuple[MiniLLM, Tokenizer]:
    """Reads a model and its tokenizer.

    Args:
        folder: a folder that `save_checkpoint` wrote, or the name of a shipped checkpoint ("small").

    Returns:
        The model in evaluation mode, fp32 on the CPU, and its tokenizer.

    Raises:
        ValueError: where there is no checkpoint.

    Example:
        >>> model, tokenizer = load_checkpoint()
        >>> sum(parameter.numel() for parameter in model.parameters())
        935040
        >>> tokenizer.encode("My favourite dish is ramen.").tokens
        ['ĠMy', 'Ġfavourite', 'Ġdish', 'Ġis', 'Ġramen', '.']
    """
    shipped = SHIPPED / folder
    folder = shipped if shipped.is_dir() else Path(folder)
    if not (folder / "model.safetensors").exists():
        names = sorted(path.name for path in SHIPPED.iterdir())
        raise ValueError(f"folder is {str(folder)!r}: no checkpoint there; shipped ones are {', '.join(names)}")
    model = MiniLLM(ModelConfig.from_yaml(folder / "config.yaml"))
    load_weights(model, load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def save_checkpoint(folder: str | Path, model: MiniLLM, tokenizer: Tokenizer) -> None:
    """Writes model.safetensors, config.yaml and tokenizer.json; `load_checkpoint` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(own_weights(model), folder / "model.safetensors")
    model.config.to_yaml(folder / "config.yaml")
    tokenizer.save(str(folder / "tokenizer.json"))


def from_transformers(hf_model: LlamaForCausalLM) -> MiniLLM:
    """A MiniLLM with the weights of a Llama from Hugging Face's transformers: same logits, by the error budget.

    Args:
        hf_model: a `LlamaForCausalLM` with plain RoPE and without biases.

    Raises:
        ValueError: where the model uses what MiniLLM does not have (biases, scaled RoPE, another activation).
    """
    theirs = hf_model.config
    rope = theirs.rope_parameters
    for name, value, wanted in (
        ("model_type", theirs.model_type, "llama"),
        ("attention_bias", theirs.attention_bias, False),
        ("mlp_bias", theirs.mlp_bias, False),
        ("hidden_act", theirs.hidden_act, "silu"),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ):
        if value != wanted:
            raise ValueError(f"hf_model has {name} {value!r}, MiniLLM wants {wanted!r}")
    shared = {name: getattr(theirs, name) for name in SHARED_NAMES}
    model = MiniLLM(ModelConfig(rope_theta=rope["rope_theta"], **shared)).to(hf_model.dtype)
    weights = {name.removeprefix("model."): weight for name, weight in hf_model.state_dict().items()}
    load_weights(model, weights)
    return model.train(hf_model.training)


def to_transformers(model: MiniLLM) -> LlamaForCausalLM:
    """The same model as a `LlamaForCausalLM` of Hugging Face's transformers (the extra `peers` installs it)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = {name: getattr(model.config, name) for name in SHARED_NAMES}
    rope = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    hf_model = LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **shared)).to(model.embed_tokens.weight.dtype)
    weights = {name if name == "lm_head.weight" else f"model.{name}": w for name, w in model.state_dict().items()}
    hf_model.load_state_dict(weights)
    return hf_model.train(model.training)


SHARED_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def own_weights(model: MiniLLM) -> dict[str, torch.Tensor]:
    """Every parameter once: a tied output matrix is the embedding, and is not written again."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def load_weights(model: MiniLLM, weights: dict[str, torch.Tensor]) -> None:
    """Takes in what `own_weights` gave: a tied output matrix comes from the embedding."""
    if model.config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["embed_tokens.weight"]}
    model.load_state_dict(weights)

"""Weights in and out: the checkpoint that ships with the course, and models of transformers. Files are safetensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from minillm.config import LAYER_TYPES, ROPE_TYPES, ModelConfig, RopeScaling, known
from minillm.model import MiniLLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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


def from_transformers(hf_model: PreTrainedModel, *, max_position_embeddings: int | None = None) -> MiniLLM:
    """A MiniLLM with the weights of a model of Hugging Face's transformers: same logits, by the error budget.

    Args:
        hf_model: a `LlamaForCausalLM` (Llama 1 to 3, with RoPE plain or scaled: "linear", "dynamic", "llama3", "yarn"),
            `MistralForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`, with or without windows.
        max_position_embeddings: the longest sequence of the result. Left out, that of the model's configuration; where
            RoPE stretches a named original context ("dynamic", "yarn"), at least `factor` times that one.

    Returns:
        The model, with the dtype, the device and the mode (training or evaluation) of `hf_model`. Its configuration has
        the special ids: those of the generation_config, by which `generate` goes, or else those of the config.

    Raises:
        ValueError: where the model is of another family (named by model_type), uses what MiniLLM does not have (such as
            another activation or biases elsewhere), or has more or fewer weights than its family.
    """
    theirs = getattr(hf_model, "config", None)
    check_family(theirs)
    assert theirs is not None
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    if head is None:
        raise ValueError(f"hf_model is a {type(hf_model).__name__}, MiniLLM wants the class that ends in ForCausalLM")
    if hf_model.training and theirs.attention_dropout:
        raise ValueError(
            f"hf_model has attention_dropout {theirs.attention_dropout} and is in training mode, MiniLLM has no "
            "dropout: call hf_model.eval() before"
        )
    # transformers keeps both where a file has two matrices that differ, whatever its config says
    tied = theirs.tie_word_embeddings and torch.equal(head.weight, embedding.weight)
    rope = read_rope(theirs.rope_parameters, theirs.max_position_embeddings)
    limit = max_position_embeddings or max(theirs.max_position_embeddings, stretched_length(rope["rope_scaling"]))
    config = ModelConfig(
        **{name: getattr(theirs, name) for name in SHARED_NAMES},
        **FAMILIES[theirs.model_type],
        **rope,
        **read_window(theirs),
        **read_special_ids(hf_model),
        head_dim=getattr(theirs, "head_dim", None) or 0,
        max_position_embeddings=limit,
        tie_word_embeddings=tied,
    )
    weights = {name.removeprefix("model."): weight for name, weight in hf_model.state_dict().items()}
    model = MiniLLM(config)
    check_weights(weights, model)
    model = model.to(device=embedding.weight.device, dtype=embedding.weight.dtype)
    load_weights(model, weights)
    return model.train(hf_model.training)


def to_transformers(model: MiniLLM) -> PreTrainedModel:
    """The same model for Hugging Face's transformers (the extra `peers` installs it).

    Returns:
        A `Qwen3ForCausalLM` where q and k have norms, a `Qwen2ForCausalLM` where q, k and v have biases, a
        `MistralForCausalLM` where all layers have a window, a `LlamaForCausalLM` else; with the special ids in config
        and generation_config.

    Raises:
        ValueError: where the options are those of no such family.
    """
    import transformers

    ours = model.config
    family = family_of(ours)
    values = {name: getattr(ours, name) for name in SHARED_NAMES}
    values |= {
        name: getattr(ours, name) for name in ("head_dim", "tie_word_embeddings", "bos_token_id", "pad_token_id")
    }
    values |= {"max_position_embeddings": ours.max_position_embeddings, "rope_parameters": rope_parameters(ours)}
    if ours.rope_scaling is not None and ours.rope_scaling.rope_type == "dynamic":
        values["max_position_embeddings"] = ours.rope_scaling.original_max_position_embeddings
    eos = ours.eos_token_ids
    values["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    if family != "llama":
        values["sliding_window"] = ours.sliding_window
    if family in ("qwen2", "qwen3"):
        layer_types = [LAYER_TYPES[ours.window(layer) is not None] for layer in range(ours.num_hidden_layers)]
        values |= {"use_sliding_window": ours.sliding_window is not None, "layer_types": layer_types}
    config = transformers.AutoConfig.for_model(family, **values)
    weight = model.embed_tokens.weight
    # with its dtype from the start: `.to(dtype)` would also round the frequencies of RoPE
    hf_model = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype).to(weight.device)
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
    "rms_norm_eps",
)
FAMILIES: dict[str, dict[str, Any]] = {  # a model_type, and what it adds in each of its models
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}


def check_family(theirs: PretrainedConfig | None) -> None:
    """Raises ValueError where a configuration of transformers asks for what MiniLLM does not have."""
    family = getattr(theirs, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"hf_model has model_type {family!r}, MiniLLM wants one of {', '.join(FAMILIES)}")
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        value = getattr(theirs, name, wanted)
        if value != wanted:
            raise ValueError(f"hf_model has {name} {value!r}, MiniLLM wants {wanted!r} for model_type {family!r}")


def read_rope(rope: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """The fields rope_theta and rope_scaling of `ModelConfig`, from the rope_parameters of transformers.

    Raises:
        ValueError: where the kind, or an entry of it, is none that MiniLLM has.
    """
    rope = {name: value for name, value in rope.items() if value is not None and name != "type"}
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    if rope_type == "default":  # transformers reads nothing else then
        return {"rope_theta": theta, "rope_scaling": None}
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"hf_model has rope_type {rope_type!r}, MiniLLM wants one of default, {', '.join(ROPE_TYPES)}")
    rope.pop("finetuned", None)  # a remark in older yarn models
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    if rope_type == "dynamic":
        rope["original_max_position_embeddings"] = max_position_embeddings
    if rope_type == "yarn":
        original = rope["original_max_position_embeddings"]
        rope.setdefault("factor", max_position_embeddings / original)
        mscale, mscale_all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        if mscale and mscale_all_dim:  # DeepSeek's own attention factor, where none is given
            log = 0.1 * math.log(rope["factor"])
            rope.setdefault("attention_factor", (log * mscale + 1) / (log * mscale_all_dim + 1))
        for name in ("beta_fast", "beta_slow"):
            if not rope.get(name, 1):  # transformers takes a 0 for "not given"
                del rope[name]
    scaling = RopeScaling(rope_type, **known(rope, RopeScaling, f"hf_model's rope_parameters of type {rope_type!r}"))
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """The rope_parameters of transformers for a configuration of ours."""
    scaling, rope = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return rope | {"rope_type": "default"}
    names = ["rope_type", "factor", *ROPE_FIELDS[scaling.rope_type]]
    values = {name: getattr(scaling, name) for name in names}
    return rope | {name: value for name, value in values.items() if value is not None}


ROPE_FIELDS = {  # beside the factor
    "linear": (),
    "dynamic": (),  # its original context is the configuration's max_position_embeddings
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"),
}


def stretched_length(scaling: RopeScaling | None) -> int:
    """The longest text that a stretched RoPE is made for, where the scaling says it; else 0."""
    if scaling is None or scaling.rope_type not in ("dynamic", "yarn"):
        return 0
    return int(scaling.factor * scaling.original_max_position_embeddings)


def read_window(theirs: PretrainedConfig) -> dict[str, Any]:
    """The fields sliding_window and layer_types of `ModelConfig`: none in a Llama, one for all in a Mistral."""
    window = None if theirs.model_type == "llama" else theirs.sliding_window
    if window is None or theirs.model_type == "mistral":
        return {"sliding_window": window}
    if "sliding_attention" not in theirs.layer_types:
        return {"sliding_window": None}
    every = set(theirs.layer_types) == {"sliding_attention"}
    return {"sliding_window": window, "layer_types": () if every else tuple(theirs.layer_types)}


def read_special_ids(hf_model: PreTrainedModel) -> dict[str, Any]:
    """The special ids of `ModelConfig`: what `generate` goes by, which reads the generation_config alone."""
    source = getattr(hf_model, "generation_config", None) or hf_model.config
    eos = source.eos_token_id
    return {
        "eos_token_ids": () if eos is None else eos,
        "bos_token_id": source.bos_token_id,
        "pad_token_id": source.pad_token_id,
    }


def family_of(config: ModelConfig) -> str:
    """The model_type of transformers that has just these options; raises ValueError where there is none."""
    if config.qk_norm and config.attention_bias:
        raise ValueError("config has qk_norm and attention_bias: no family of transformers that we know has both")
    if config.qk_norm or config.attention_bias:
        return "qwen3" if config.qk_norm else "qwen2"
    windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
    if len(windows) > 1:
        raise ValueError(
            "config has a window in some layers only, and neither attention_bias nor qk_norm: no family of "
            "transformers that we know is so, give all layers the window or none"
        )
    return "llama" if windows == {None} else "mistral"


def check_weights(weights: dict[str, torch.Tensor], model: MiniLLM) -> None:
    """Raises ValueError where weights of transformers are not all that the model has, or are of several dtypes."""
    dtypes = {weight.dtype for weight in weights.values()}
    if quantised := [dtype for dtype in dtypes if not dtype.is_floating_point]:
        raise ValueError(f"hf_model has weights in {quantised[0]}: load it without a quantization_config")
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"hf_model has weights in {names}: give all one dtype, as hf_model.to(torch.float32) does")
    differing = sorted(weights.keys() ^ model.state_dict().keys())
    if differing:
        raise ValueError(
            f"hf_model has other weights than MiniLLM, such as {differing[0]!r}: where they are adapters, "
            "merge them into the model before (peft: merge_and_unload)"
        )


def own_weights(model: MiniLLM) -> dict[str, torch.Tensor]:
    """Every parameter once: a tied output matrix is the embedding, and is not written again."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def load_weights(model: MiniLLM, weights: dict[str, torch.Tensor]) -> None:
    """Takes in what `own_weights` gave: a tied output matrix comes from the embedding.

    Raises:
        ValueError: where the model is tied, and the weights have an output matrix that is not the embedding.
    """
    if model.config.tie_word_embeddings:
        embedding = weights["embed_tokens.weight"]
        if not torch.equal(weights.get("lm_head.weight", embedding), embedding):
            raise ValueError(
                "weights has a lm_head.weight that is not embed_tokens.weight, and tie_word_embeddings is True: "
                "set it to False in the configuration to use both, or leave lm_head.weight out"
            )
        weights = weights | {"lm_head.weight": embedding}
    model.load_state_dict(weights)

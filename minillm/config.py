"""The shape of a MiniLLM: one frozen dataclass, three presets, and YAML in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model of Llama's architecture, under the names that transformers' configurations use.

    The options after `tie_word_embeddings` are what Llama 3, Mistral, Qwen2 and Qwen3 add to it.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the SwiGLU feed-forward.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads (GQA); divides `num_attention_heads`.
        head_dim: size of one head; 0 stands for `hidden_size / num_attention_heads`.
        max_position_embeddings: the longest sequence, in tokens.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square inside RMSNorm.
        tie_word_embeddings: the output matrix is the embedding matrix.
        rope_scaling: how RoPE is stretched to longer texts (a `RopeScaling`, or its fields as a dict); None: it is not.
        sliding_window: tokens that a query sees, itself included (Mistral); None for all before it.
        layer_types: "sliding_attention" for each layer with that window, "full_attention" for each without (Qwen2,
            Qwen3); left out, `sliding_window` holds for all layers.
        attention_bias: the projections of q, k and v add a bias (Qwen2).
        qk_norm: RMSNorm over each head of q and of k, before RoPE (Qwen3).
        eos_token_ids: ids that end a text; one may stand alone. Empty: none does.
        bos_token_id, pad_token_id: what begins and what pads a text, for those who ask; the model does not.

    Raises:
        ValueError: where sizes or options do not fit together.

    Example:
        >>> config = ModelConfig.small()
        >>> config.num_attention_heads, config.num_key_value_heads, config.head_dim
        (4, 2, 32)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        self._set_plain_types()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, "
                f"not a divisor of num_attention_heads {self.num_attention_heads}"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_attention_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, RoPE turns pairs: it must be even")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}, wants 1 or more, or None for no window")
        if self.layer_types:
            self._check_layer_types()
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim is {self.head_dim}, rope_scaling 'dynamic' wants 4 or more")

    def _set_plain_types(self) -> None:
        """Tuples for YAML's lists, a tuple for one id alone, and a `RopeScaling` for its fields."""
        ids = self.eos_token_ids
        values = {
            "eos_token_ids": () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids),
            "layer_types": tuple(self.layer_types or ()),
        }
        if isinstance(self.rope_scaling, dict):
            values["rope_scaling"] = RopeScaling(**known(self.rope_scaling, RopeScaling, "rope_scaling"))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_layer_types(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= set(LAYER_TYPES):
            raise ValueError(
                f"layer_types is {list(self.layer_types)}, wants {' or '.join(map(repr, LAYER_TYPES))} "
                f"for each of {self.num_hidden_layers} layers"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has 'sliding_attention', and sliding_window is None: give both or neither")

    def window(self, layer_idx: int) -> int | None:
        """How many tokens a query of a layer sees, itself included; None for all before it."""
        full = bool(self.layer_types) and self.layer_types[layer_idx] == "full_attention"
        return None if full else self.sliding_window

    @classmethod
    def small(cls) -> ModelConfig:
        """The checkpoint that ships with the course: about a million parameters."""
        return cls(
            vocab_size=1536,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_ids=(3,),  # <|end|> and <|pad|> of its tokenizer, `END_ID` and `PAD_ID`
            pad_token_id=0,
        )

    @classmethod
    def medium(cls) -> ModelConfig:
        """A laptop-sized model with multi-head attention: 8 layers, 8 heads of 64."""
        return cls(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
        )

    @classmethod
    def large(cls) -> ModelConfig:
        """A GPU-sized model with grouped queries: 16 layers, 16 query heads on 8 KV heads of 64."""
        return cls(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=4096,
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """Reads a configuration from a YAML file of `name: value` lines.

        Fields that the file does not have, as those of an older version, take their defaults.

        Raises:
            ValueError: on a name that is no field of `ModelConfig`.
        """
        import yaml  # here and below, because models are also made where only torch is installed

        return cls(**known(yaml.safe_load(Path(path).read_text()), cls, path))

    def to_yaml(self, path: str | Path) -> None:
        """Writes the configuration as YAML, in a form that `from_yaml` reads."""
        import yaml

        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False))


@dataclass(frozen=True)
class RopeScaling:
    """How the angles of RoPE are stretched, so that a model reads longer texts than it was first trained on.

    Args:
        rope_type: "linear", "dynamic", "llama3" or "yarn"; `minillm.rope` has the formula and the source of each.
            "dynamic" turns all tokens of a call by the text's length at that call; keys in a cache keep the angles of
            theirs, as in transformers, so that beyond the original length logits depend on where a text was cut.
        factor: how many times as long a text becomes.
        original_max_position_embeddings: the longest text of the first training; "linear" has no use for it.
        low_freq_factor, high_freq_factor: "llama3": pairs that turn fewer times than the first within an original text
            are slowed by `factor`, those that turn more often than the second are left alone.
        beta_fast, beta_slow: "yarn": the same two borders, the fast one first.
        truncate: "yarn": borders are rounded to whole pairs.
        attention_factor: "yarn": multiplies cosines and sines, and so the scores by its square; left out, the
            paper's 0.1 ln(factor) + 1.

    Raises:
        ValueError: where the kind is unknown, or a number that it needs is missing or makes no sense.

    Example:
        >>> RopeScaling("linear", factor=4.0).factor
        4.0
        >>> RopeScaling("llama3", factor=8.0)
        Traceback (most recent call last):
        ValueError: original_max_position_embeddings is 0, rope_type 'llama3' wants the length of the first training
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r}, wants one of {', '.join(ROPE_TYPES)}")
        if not self.factor >= 1:
            raise ValueError(f"factor is {self.factor}, wants 1 or more")
        if self.rope_type != "linear" and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}, "
                f"rope_type {self.rope_type!r} wants the length of the first training"
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low)} and {high} {getattr(self, high)}, want 0 < {low} < {high}"
                )


def known(values: dict[str, Any], dataclass: type, where: object) -> dict[str, Any]:
    """The values unchanged; raises ValueError where one is no field of the dataclass."""
    unknown = set(values) - {field.name for field in fields(dataclass)}
    if unknown:
        raise ValueError(f"{where} has unknown entries: {', '.join(sorted(unknown))}")
    return values


Configs = ModelConfig

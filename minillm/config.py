"""The shape of a MiniLLM: one frozen dataclass, three presets, and YAML in and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-architecture model, under the names that transformers' `LlamaConfig` uses.

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

    Raises:
        ValueError: where the sizes do not fit together.

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

    def __post_init__(self):
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

        Raises:
            ValueError: on a name that is no field of `ModelConfig`.
        """
        import yaml  # here and below, because models are also made where only torch is installed

        values = yaml.safe_load(Path(path).read_text())
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"{path} has unknown entries: {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_yaml(self, path: str | Path) -> None:
        """Writes the configuration as YAML, in a form that `from_yaml` reads."""
        import yaml

        Path(path).write_text(yaml.safe_dump(asdict(self), sort_keys=False))


Configs = ModelConfig

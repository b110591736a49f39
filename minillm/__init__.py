"""MiniLLM: the library that the lessons build. Attention, the model, its checkpoint, and what measures them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minillm.cache import KVCache
from minillm.config import Configs, ModelConfig
from minillm.model import MiniLLM

if TYPE_CHECKING:
    from minillm.generate import TextGenerator

__version__ = "2026.11.0"
__all__ = ["Configs", "KVCache", "MiniLLM", "ModelConfig", "TextGenerator"]


def __getattr__(name: str) -> Any:
    """`TextGenerator` is imported when it is asked for: it needs a tokenizer, the rest of the package torch alone."""
    if name == "TextGenerator":
        from minillm.generate import TextGenerator

        return TextGenerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a lesson needs around its idea: a function's source, a stored result, the model on a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from course.source import show_source
from minillm.corpus import BOT, user_turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer


__all__ = ["most_watched", "question", "show_source", "stored_result", "tokenize"]

QUOTED_MACHINE = "amd-epyc-2-threads"


def stored_result(name: str, machine: str = QUOTED_MACHINE) -> dict:
    """A benchmark's stored result, with device, versions, date and commit.

    Args:
        name, machine: as in benchmarks/results/<machine>/<name>.json. Left out, the machine is the one that the lessons
            quote; one that you measured yourself has a folder beside it.
    """
    results = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
    return json.loads((results / machine / f"{name}.json").read_text())


def tokenize(tokenizer: Tokenizer, text: str) -> tuple[Tensor, list[str]]:
    """A text as the model sees it.

    Returns:
        input_ids (1, seqlen), and each token as a label for a picture.
    """
    encoding = tokenizer.encode(text)
    labels = [tokenizer.decode([i], skip_special_tokens=False).strip() for i in encoding.ids]
    return torch.tensor([encoding.ids]), labels


def question(sentences: str) -> str:
    """What a person says, as a prompt: the bot is to answer next."""
    return user_turn([sentences]) + BOT


def most_watched(probabilities: list[Tensor], query: int, key: int) -> tuple[int, int]:
    """The (layer, head) whose query gives a key the largest probability; (nheads, seqlen, seqlen) a layer."""
    weights = torch.stack([layer[:, query, key] for layer in probabilities])  # (layers, nheads)
    layer, head = divmod(int(weights.argmax()), weights.shape[1])
    return layer, head

"""Token ids in whatever form a caller has them: lists, Tensors, arrays."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

from torch import Tensor


def as_prompts(prompt_ids) -> tuple[list[list[int]], bool]:
    """The ids as lists, whatever their form; and whether they were one prompt rather than a batch."""
    try:
        rows = list(prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else prompt_ids)
        single = not rows or not isinstance(rows[0], Iterable)
        return [list(map(index, row)) for row in ([rows] if single else rows)], single
    except TypeError:  # no sequence, or one of texts, of fractions, or of more than two dimensions
        raise TypeError(
            f"prompt_ids is {prompt_ids!r:.60}, wants the integer ids of one prompt, or of several"
        ) from None


def as_stop_tokens(stop_tokens, vocab_size: int) -> list[int]:
    """The ids as a list, whatever their form."""
    try:
        tokens = stop_tokens.tolist() if hasattr(stop_tokens, "tolist") else stop_tokens
        tokens = list(tokens) if isinstance(tokens, Iterable) else [tokens]
        if any(isinstance(token, bool) for token in tokens):
            raise TypeError
        ids = list(map(index, tokens))
    except TypeError:
        raise TypeError(
            f"stop_tokens is {stop_tokens!r:.60}, wants a token's id, or a sequence or Tensor of ids; () for none"
        ) from None
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"stop_tokens holds the id {token}, the vocabulary goes from 0 to {vocab_size - 1}; () for none"
            )
    return ids

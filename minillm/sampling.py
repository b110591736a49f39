"""From logits to the next token: greedy, temperature, top-k, top-p, min-p. Plain PyTorch; only top-p sorts."""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a token for each row.

    Args:
        logits: (batch, vocab_size).
        temperature, top_k, top_p, min_p: as in `next_token_probabilities`; temperature 0 takes the largest
            logit (greedy).
        generator: makes the draw repeatable; on the device of the logits.

    Returns:
        (batch,) int64.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
        >>> sample(logits, temperature=0)  # greedy
        tensor([1])
        >>> draw = sample(logits, top_k=2, generator=torch.Generator().manual_seed(0))  # 1 or 2
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(logits, temperature, top_k, top_p, min_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The distribution that `sample` draws from. Each filter applies to what the one before has kept.

    Args:
        logits: (batch, vocab_size), any float dtype; computed in fp32 at least.
        temperature: the logits are divided by it; below 1 sharper, above 1 flatter.
        top_k: only the k largest logits stay, and what equals the k-th; 0 for all.
        top_p: only the fewest tokens stay whose probabilities together reach p; 1 for all.
        min_p: only tokens stay that have at least this share of the largest probability; 0 for all.

    Returns:
        (batch, vocab_size), rows that sum to 1; never all zero, for the largest logit always stays.

    Source:
        top-k: Fan et al., arXiv 1805.04833; top-p: Holtzman et al., arXiv 1904.09751; min-p: Nguyen et al.,
        arXiv 2407.01082. The order is transformers'.

    Example:
        >>> probabilities = torch.tensor([[0.1, 0.6, 0.3]])
        >>> next_token_probabilities(probabilities.log(), top_k=2)
        tensor([[0.0000, 0.6667, 0.3333]])
        >>> next_token_probabilities(probabilities.log(), top_p=0.5)
        tensor([[0., 1., 0.]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # With the largest logit subtracted first, a temperature near 0 sends the others to -inf and none to inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ascending, tokens = logits.sort(-1)
        below = ascending.softmax(-1).cumsum(-1)  # what a token and all smaller ones have together
        outside = below <= 1 - top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.gather(-1, tokens.argsort(-1)), -torch.inf)
    probabilities = logits.softmax(-1)
    if min_p > 0:
        largest = probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * largest, 0)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises ValueError where an option is out of its range."""
    for name, value, right, wanted in (
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (all) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1 (all)"),
        ("min_p", min_p, 0 <= min_p <= 1, "0 (all) to 1"),
    ):
        if not right:
            raise ValueError(f"{name} is {value}, wants {wanted}")

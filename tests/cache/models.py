"""Small random models whose logits are large enough to tell right from wrong, and their answers without a cache."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from minillm import MiniLLM, ModelConfig

BACKENDS = {
    "naive": {"use_flash_attention": False},
    "tiled": {"flash_block_size": 7},
    "sdpa": {"attention_backend": "sdpa"},
}


def random_model(dtype=torch.float32, **changes) -> MiniLLM:
    torch.manual_seed(0)
    shape = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = MiniLLM(ModelConfig(**(shape | changes)))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # a norm's weights that are not all 1
    return model.eval().to(dtype)


def random_ids(*shape: int, vocab_size=61, seed=0) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def uncached(model: MiniLLM, ids: Tensor) -> dict[str, Tensor]:
    """The arguments `naive` and `reference` of the error budget: the same precision, and float64."""
    double = copy.deepcopy(model).double()
    return {
        "naive": model(ids, use_flash_attention=False),
        "reference": double(ids, use_flash_attention=False),
        "multiple": 8,
    }

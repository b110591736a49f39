"""RoPE against transformers: the same rotation, and keys that are moved after they were rotated."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minillm.measure import assert_within_budget
from minillm.rope import apply_rope, rotary_tables, shift_rope

KEYS = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0))
THETA = 10_000.0


def theirs(x, positions):
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, head_dim=16)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    return apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)


def in_float64(x, positions):
    pair = torch.arange(0, 16, 2, dtype=torch.float64)
    angles = positions[..., None].double() * THETA ** (-pair / 16)
    return apply_rope(x.double(), angles.cos(), angles.sin())


@pytest.mark.parametrize("start", [0, 1, 500, -9])
def test_the_rotation_is_that_of_transformers_at_any_position(start):
    positions = torch.arange(start, start + 7).expand(2, -1)
    ours = apply_rope(KEYS, *rotary_tables(positions, 16))
    assert_within_budget(ours, theirs(KEYS, positions), in_float64(KEYS, positions))


@pytest.mark.parametrize("offset", [0, 1, 37, -20, 1000])
def test_a_rotated_key_that_is_moved_equals_the_key_rotated_there(offset):
    positions = torch.arange(3, 10).expand(2, -1)
    moved = shift_rope(apply_rope(KEYS, *rotary_tables(positions, 16)), offset)
    there = theirs(KEYS, positions + offset)
    # Two rotations round twice, each by angles that are right to an eps of the position.
    assert_within_budget(moved, there, in_float64(KEYS, positions + offset), multiple=4 + abs(offset))


def test_each_token_can_have_an_offset_of_its_own():
    positions = torch.zeros(2, 7, dtype=torch.int64)
    offsets = torch.arange(14).view(2, 7)
    moved = shift_rope(apply_rope(KEYS, *rotary_tables(positions, 16)), offsets)
    assert torch.equal(moved, apply_rope(KEYS, *rotary_tables(offsets, 16)))


def test_moving_there_and_back_is_the_identity():
    there = shift_rope(KEYS.double(), 11)
    assert_within_budget(shift_rope(there, -11).float(), KEYS, KEYS.double())

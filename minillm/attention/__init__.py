"""Attention, step by step: `naive` → `online` → `tiled`, and one dispatch over all of them in `backends`."""

from minillm.attention.backends import attend, attention, attention_varlen, choose_backend
from minillm.attention.keys import Keys
from minillm.attention.naive import naive_attention
from minillm.attention.online import merge_state, online_softmax_attention
from minillm.attention.tiled import flash_attention

__all__ = [
    "Keys",
    "attend",
    "attention",
    "attention_varlen",
    "choose_backend",
    "flash_attention",
    "merge_state",
    "naive_attention",
    "online_softmax_attention",
]

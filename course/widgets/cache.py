"""A KV cache as it fills: its slots, and the bytes that are used and allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from ipywidgets import IntSlider
from matplotlib.artist import Artist
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from course.figures import GREY, K
from course.widgets.explorer import NOW, Drawn, Stage, box, choice, show
from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.measure import format_bytes

PREFILLED, DECODED = K, "#E8B48A"  # slots hold keys (and values): the keys' colour, and a lighter one


def cache_filling(
    prompts: Sequence[int] = (9, 3, 14), new_tokens: int = 18, *, capacity: int = 8, step: int | None = None
) -> None:
    """Shows a KV cache as it fills, row by row, with the bytes that are used and those that are allocated.

    Lengths, capacity and bytes are those of a `KVCache` that the same tokens went through: fp32, four layers, KV
    heads of 32 numbers, as in the shipped model.

    Args:
        prompts: tokens of each row's prompt.
        new_tokens: tokens that each row writes after it.
        capacity: where its control starts: tokens a row that are allocated at the beginning.
        step: the forward that is shown at the start, and in the stored picture; left out, two thirds of them.
    """
    limit = max(prompts) + new_tokens
    sizes = [size for size in (8, 16, 32, 64) if size < limit] + [limit]
    controls = {
        "step": IntSlider(2 * new_tokens // 3 if step is None else step, 0, new_tokens + 1, description="forward"),
        "capacity": choice("capacity", sizes, capacity),
        "heads_k": choice("KV heads", (1, 2, 4), 2),
    }
    show("The KV cache fills", _filler(tuple(prompts), new_tokens), controls)


class Filling(NamedTuple):
    """A cache after a forward: its rows' lengths, its capacity, and bytes."""

    lengths: list[int]
    capacity: int
    nbytes: int
    used: int


@lru_cache(maxsize=64)
def filled_cache(prompts: tuple[int, ...], new_tokens: int, capacity: int, heads_k: int) -> list[Filling]:
    """Runs a `KVCache` through a prefill and the steps after it: its state before the first forward and after each."""
    config = ModelConfig(
        vocab_size=1,
        hidden_size=128,
        intermediate_size=1,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=heads_k,
        max_position_embeddings=max(prompts) + new_tokens,
    )
    cache = KVCache(config, len(prompts), capacity=capacity)
    states = [_state(cache)]
    for counts in (prompts, *[(1,) * len(prompts)] * new_tokens):
        new = torch.zeros(len(prompts), max(counts), heads_k, config.head_dim)
        for layer in range(config.num_hidden_layers):
            cache.append(new, new, layer, counts)
        states.append(_state(cache))
    return states


def _state(cache: KVCache) -> Filling:
    return Filling(cache.lengths, cache.capacity, cache.nbytes, cache.used_bytes)


def _filler(prompts: tuple[int, ...], new_tokens: int) -> Callable[..., Drawn]:
    """Draws the slots of each row, and under them the bytes over the forwards so far."""
    limit = max(prompts) + new_tokens
    figure, (above, below) = plt.subplots(2, 1, figsize=(9.4, 4.6), height_ratios=(1.1, 1))
    slots = [(row, slot) for row in range(len(prompts)) for slot in range(limit)]
    grid = PolyCollection([box(range(r, r + 1), range(s, s + 1)) for r, s in slots], linewidths=0.8)
    above.add_collection(grid)
    above.set(xlim=(-0.2, limit + 0.2), ylim=(len(prompts) + 0.1, -0.1), xlabel="slot = position", xticks=[0, limit])
    above.set_yticks([row + 0.5 for row in range(len(prompts))], [f"row {row}" for row in range(len(prompts))])
    above.spines[["left", "bottom"]].set_visible(False)
    title = above.set_title("capacity", loc="left", fontsize=10)
    largest = filled_cache(prompts, new_tokens, limit, 4)[-1].nbytes / 1024
    (allocated,) = below.plot([], [], color=GREY, drawstyle="steps-post", linewidth=2, label="allocated")
    (used,) = below.plot([], [], color=K, linewidth=2, marker="o", markersize=3, label="used")
    below.set(xlim=(-0.3, new_tokens + 1.3), ylim=(0, 1.08 * largest), xlabel="forward", ylabel="KiB")
    below.set_xticks(range(0, new_tokens + 2, 2))
    below.legend(frameon=False, fontsize=9, loc="upper left")
    figure.legend(handles=_slot_legend(), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    stage = Stage(figure, [grid, title, allocated, used])

    def draw(step: int, capacity: int, heads_k: int) -> Drawn:
        states = filled_cache(prompts, new_tokens, capacity, heads_k)
        state, before = states[step], states[max(0, step - 1)]
        colours = [_slot_colour(r, s, state, before, prompts) for r, s in slots]
        outside = [s >= state.capacity for _, s in slots]
        grid.set(facecolor=colours, edgecolor=["#E8E8E8" if out else GREY for out in outside])
        title.set_text(f"capacity: {state.capacity} slots a row, {sum(state.lengths)} used in all")
        allocated.set_data(range(step + 1), [s.nbytes / 1024 for s in states[: step + 1]])
        used.set_data(range(step + 1), [s.used / 1024 for s in states[: step + 1]])
        words = _in_words(step, state, before, heads_k)
        return stage.png(), f"{words} At the start there were {capacity} slots a row."

    return draw


def _slot_legend() -> list[Artist]:
    return [
        Patch(facecolor=NOW, label="written by this forward"),
        Patch(facecolor=PREFILLED, label="from the prompt"),
        Patch(facecolor=DECODED, label="from a step before"),
        Patch(facecolor="white", edgecolor=GREY, label="allocated"),
        Patch(facecolor="white", edgecolor="#E8E8E8", label="not allocated"),
    ]


def _slot_colour(row: int, slot: int, state: Filling, before: Filling, prompts: tuple[int, ...]) -> str:
    if slot >= state.lengths[row]:
        return "white"
    if slot >= before.lengths[row]:
        return NOW
    return PREFILLED if slot < prompts[row] else DECODED


def _in_words(step: int, state: Filling, before: Filling, heads_k: int) -> str:
    sizes = f"{format_bytes(state.used)} of {format_bytes(state.nbytes)} are used, with KV heads: {heads_k}."
    if step == 0:
        return f"Nothing is computed yet: {state.capacity} slots a row are allocated. {sizes}"
    lengths = ", ".join(map(str, state.lengths))
    what = "Prefill: all rows at once" if step == 1 else f"Decode step {step - 1}: one token a row"
    grew = f" It was full: {before.capacity} slots became {state.capacity}." if state.capacity > before.capacity else ""
    return f"{what}. The rows hold {lengths} tokens.{grew} {sizes}"

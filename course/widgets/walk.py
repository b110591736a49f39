"""The walk of FlashAttention over its tiles, with the bytes that it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from ipywidgets import Checkbox, IntSlider
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from course.figures import GREY, K, O, P, Q, V
from course.widgets.explorer import NOW, Drawn, Stage, blocks, box, choice, corners, show
from minillm.attention.masks import Visibility, tiles
from minillm.attention.tiled import Tiling, tiled_forward
from minillm.measure import Traffic, count_operators, count_traffic, format_bytes

COLOURS = {"q": Q, "k": K, "v": V, "out": O, "lse": GREY}  # of the counter's parts


def tile_walk(
    seqlen_q: int = 128,
    seqlen_k: int = 128,
    headdim: int = 64,
    *,
    block_q: int = 32,
    block_k: int = 32,
    causal: bool = False,
    step: int | None = None,
) -> None:
    """Shows the walk of FlashAttention over the tiles of one head, and counts its HBM traffic beside it, in bf16.

    The counts come from `tiled_forward` as it runs, and those of the unfused formula from its three operators.

    Args:
        seqlen_q, seqlen_k, headdim: of the attention; up to 256 queries and keys react quickly.
        block_q, block_k, causal: where the controls start.
        step: how many tiles are visited at the start, and in the stored picture; left out, half of them.
    """
    size = (seqlen_q, seqlen_k, headdim)
    walk = counted_walk(*size, block_q, block_k, causal)
    count = len(walk.visits)
    steps = IntSlider(count // 2 if step is None else step, 0, count, description="tiles visited")
    controls = {
        "step": steps,
        "block_q": choice("block_q", blocks(seqlen_q, block_q), block_q),
        "block_k": choice("block_k", blocks(seqlen_k, block_k), block_k),
        "causal": Checkbox(causal, description="causal"),
    }

    def same_share(_: Any) -> None:
        """Another tiling has another number of steps: keeps the slider at the same share of them."""
        count = len(counted_walk(*size, *(controls[name].value for name in ("block_q", "block_k", "causal"))).visits)
        share = steps.value / steps.max
        with steps.hold_trait_notifications():
            steps.max, steps.value = count, round(share * count)

    for name in ("block_q", "block_k", "causal"):
        controls[name].observe(same_share, names="value")
    smallest = (min(blocks(seqlen_q, block_q)), min(blocks(seqlen_k, block_k)))
    show("FlashAttention: tiles visited, bytes moved", _walker(size, smallest), controls)


class Walk(NamedTuple):
    """A run of the tiled forward.

    Attributes:
        visibility: its mask.
        visits: (queries, keys) of each tile, in the order of the visits.
        moved: bytes by tensor before the first tile and after each; what a tile of queries writes when its walk is
            over is in the count of the last tile of that walk.
        on_chip: the most bytes that were on the chip at a time.
    """

    visibility: Visibility
    visits: list[tuple[range, range]]
    moved: list[Counter[str]]
    on_chip: int


@lru_cache(maxsize=256)
def counted_walk(seqlen_q: int, seqlen_k: int, headdim: int, block_q: int, block_k: int, causal: bool) -> Walk:
    """Runs `tiled_forward` on one head in bf16 and notes the traffic after each tile."""
    visibility = Visibility(seqlen_q, seqlen_k, causal)
    visits = [(rows, keys) for rows in tiles(seqlen_q, block_q) for keys in visibility.key_tiles(rows, block_k)]
    q, kv = (torch.zeros(1, n, 1, headdim, dtype=torch.bfloat16) for n in (seqlen_q, seqlen_k))
    with count_traffic() as traffic:
        moved = _note_after_each_tile(traffic)
        tiled_forward(q, kv, kv, Tiling(visibility, 1.0, 0.0, block_q, block_k))
    moved[-1] = traffic.read + traffic.written
    assert len(moved) == len(visits) + 1, "the loop did not visit the tiles that the mask lets through"
    return Walk(visibility, visits, moved, traffic.peak_on_chip)


def _note_after_each_tile(traffic: Traffic) -> list[Counter[str]]:
    """Is called with each tensor on the chip: a tile of queries opens a walk, acc closes a tile."""
    moved: list[Counter[str]] = [Counter()]
    hold = traffic.hold

    def listen(name: str, tile: Tensor) -> None:
        if name == "q":
            moved[-1] = traffic.read + traffic.written  # the walk before has written its rows by now
        hold(name, tile)
        if name == "acc":
            moved.append(traffic.read + traffic.written)

    traffic.hold = listen  # type: ignore[method-assign]
    return moved


@lru_cache(maxsize=256)
def unfused_bytes(seqlen_q: int, seqlen_k: int, headdim: int) -> int:
    """What the three operators of the plain formula move for one head in bf16, without a mask."""
    q, k, v = (torch.zeros(n, headdim, dtype=torch.bfloat16) for n in (seqlen_q, seqlen_k, seqlen_k))
    calls = count_operators(lambda: torch.softmax(q @ k.T, dim=-1) @ v)
    return sum(read + written for _, read, written in calls)


def _walker(size: tuple[int, int, int], smallest: tuple[int, int]) -> Callable[..., Drawn]:
    """Draws the tiles of a walk, and the counter beside them, which has room for what the smallest tiles move."""
    largest = max(unfused_bytes(*size), counted_walk(*size, *smallest, causal=False).moved[-1].total())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.9), width_ratios=(1.1, 1))
    matrix, counter = _Matrix(left, *size[:2]), _CounterBars(right, size, largest)
    figure.legend(handles=_legend(), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    stage = Stage(figure, [*matrix.moving, *counter.moving])

    def draw(step: int, block_q: int, block_k: int, causal: bool) -> Drawn:
        walk = counted_walk(*size, block_q, block_k, causal)
        matrix.update(walk, step, block_q, block_k)
        counter.update(walk, step)
        return stage.png(), _in_words(walk, step, unfused_bytes(*size))

    return draw


class _Matrix:
    """The score matrix in tiles; Q and O stand beside it, K and V above it, filled where a tile of them is in use."""

    def __init__(self, axes: Axes, seqlen_q: int, seqlen_k: int):
        self._seqlens = (seqlen_q, seqlen_k)
        self._tiles = PolyCollection([], linewidths=0.8)
        self._hidden = PolyCollection([], facecolors="white", edgecolors=GREY, hatch="/////", linewidths=0)
        self._frame = PolyCollection([], facecolors="none", edgecolors=NOW, linewidths=2.5)
        self._in_use = PolyCollection([], facecolors=(Q, K, V))
        self._written = PolyCollection([], facecolors=O)
        (self._skipped,) = axes.plot([], [], "x", color=GREY)
        collections = [self._tiles, self._hidden, self._frame, self._in_use, self._written]
        for collection in collections:
            axes.add_collection(collection)
        self.moving: list[Artist] = [*collections, self._skipped]
        self._draw_scenery(axes)

    def update(self, walk: Walk, step: int, block_q: int, block_k: int) -> None:
        grid = [(rows, keys) for rows in tiles(self._seqlens[0], block_q) for keys in tiles(self._seqlens[1], block_k)]
        order = {visit: number for number, visit in enumerate(walk.visits, start=1)}
        now = walk.visits[step - 1 : step] if step else []
        self._tiles.set_verts([box(*tile) for tile in grid])
        colours = [_tile_colour(order.get(tile), step) for tile in grid]
        self._tiles.set(facecolor=colours, edgecolor=[GREY if colour == "white" else "white" for colour in colours])
        cut = [tile for tile in order if not walk.visibility.sees_all(*tile)]
        self._hidden.set_verts([_hidden_part(*tile, walk.visibility) for tile in cut])
        skipped = [tile for tile in grid if tile not in order]
        self._skipped.set_data([_middle(keys) for _, keys in skipped], [_middle(rows) for rows, _ in skipped])
        self._frame.set_verts([box(*tile) for tile in now])
        self._in_use.set_verts([box for rows, keys in now for box in self._sides(rows, keys)])
        last = {rows: number for (rows, _), number in order.items()}  # of each walk, the number of its last tile
        self._written.set_verts([self._output(rows) for rows, number in last.items() if number <= step])

    def _sides(self, rows: range, keys: range) -> list[list[tuple[float, float]]]:
        """Where the tiles of Q, K and V stand that are on the chip."""
        above, beside = (length / 100 for length in self._seqlens)
        q = corners(-9 * beside, -3 * beside, rows.start, rows.stop)
        k = corners(keys.start, keys.stop, -17 * above, -11 * above)
        v = corners(keys.start, keys.stop, -9 * above, -3 * above)
        return [q, k, v]

    def _output(self, rows: range) -> list[tuple[float, float]]:
        width = self._seqlens[1] / 100
        return corners(103 * width, 109 * width, rows.start, rows.stop)

    def _draw_scenery(self, axes: Axes) -> None:
        """The empty outlines of Q, K, V and O, with their names."""
        seqlen_q, seqlen_k = self._seqlens
        whole = (range(seqlen_q), range(seqlen_k))
        outlines = [*self._sides(*whole), self._output(whole[0])]
        axes.add_collection(PolyCollection(outlines, facecolors="none", edgecolors=(Q, K, V, O), linewidths=1))
        for name, colour, x, y in (("Q", Q, -6, 104), ("K", K, -6, -14), ("V", V, -6, -6), ("O", O, 106, 104)):
            place = (x * seqlen_k / 100, y * seqlen_q / 100)
            axes.text(*place, name, color=colour, ha="center", va="center", fontweight="bold")
        axes.set(xlim=(-0.1 * seqlen_k, 1.1 * seqlen_k), ylim=(1.09 * seqlen_q, -0.18 * seqlen_q))
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)


class _CounterBars:
    """Bytes moved so far by tensor, over those of the unfused formula."""

    def __init__(self, axes: Axes, size: tuple[int, int, int], largest: int):
        self._unfused = unfused_bytes(*size)
        self._parts = {name: axes.barh(1, 0, height=0.5, color=colour)[0] for name, colour in COLOURS.items()}
        self._whole = axes.barh(1, 0, height=0.5, facecolor="none", edgecolor=GREY, linestyle="--")[0]
        self._title = axes.text(0, 1.42, "", fontsize=10)
        self._lines = {
            name: axes.text(0.5 * largest, -0.9 - 0.42 * i, "", color=colour, ha="right")
            for i, (name, colour) in enumerate(COLOURS.items())
        }
        self._on_chip = axes.text(0, -3.3, "", fontsize=10)
        self.moving = [*self._parts.values(), self._whole, self._title, *self._lines.values(), self._on_chip]
        self._draw_scenery(axes, size, largest)

    def update(self, walk: Walk, step: int) -> None:
        start, moved = 0, walk.moved[step]
        for name, part in self._parts.items():
            part.set(x=start, width=moved[name])
            start += moved[name]
            self._lines[name].set_text(format_bytes(moved[name]))
        self._whole.set_width(walk.moved[-1].total())
        ratio = walk.moved[-1].total() / self._unfused
        self._title.set_text(f"tiled: {format_bytes(start)} so far (dashed: in the end, {ratio:.2f} × unfused)")
        self._on_chip.set_text(f"on the chip: {format_bytes(walk.on_chip)} at most")

    def _draw_scenery(self, axes: Axes, size: tuple[int, int, int], largest: int) -> None:
        seqlen_q, seqlen_k, headdim = size
        once = {"q": seqlen_q, "k": seqlen_k, "v": seqlen_k, "out": seqlen_q}
        start = 0
        for name, rows in once.items():
            axes.barh(0, 2 * rows * headdim, left=start, height=0.5, color=COLOURS[name])
            start += 2 * rows * headdim
        axes.barh(0, self._unfused - start, left=start, height=0.5, color=P)
        axes.text((self._unfused + start) / 2, 0, "S and P", color="white", ha="center", va="center")
        axes.text(0, 0.42, f"unfused: {format_bytes(self._unfused)}")
        names = ("Q read", "K read", "V read", "O written", "LSE written")
        for i, (name, colour) in enumerate(zip(names, COLOURS.values(), strict=True)):
            axes.text(0, -0.9 - 0.42 * i, name, color=colour)
        axes.set(xlim=(0, largest), ylim=(-3.6, 1.75), xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)


def _legend() -> list[Artist]:
    return [
        Patch(facecolor=NOW, label="this step"),
        Patch(facecolor=P, label="visited"),
        Patch(facecolor="white", edgecolor=GREY, label="to come"),
        Patch(facecolor="white", edgecolor=GREY, hatch="/////", label="visited, but masked"),
        Line2D([], [], color=GREY, marker="x", linestyle="", label="skipped, never loaded"),
    ]


def _tile_colour(number: int | None, step: int) -> str:
    return "white" if number is None or number > step else NOW if number == step else P


def _hidden_part(queries: range, keys: range, visibility: Visibility) -> list[tuple[float, float]]:
    """The keys of a tile that a causal mask hides, as a staircase at its right side."""
    stairs: list[tuple[float, float]] = []
    for query in queries:
        stop = min(keys.stop, max(keys.start, visibility.keys_of(query)[1]))
        stairs += [(stop, query), (stop, query + 1)]
    return [*stairs, (keys.stop, queries.stop), (keys.stop, queries.start)]


def _middle(positions: range) -> float:
    return (positions.start + positions.stop) / 2


def _in_words(walk: Walk, step: int, unfused: int) -> str:
    moved, end = (format_bytes(walk.moved[i].total()) for i in (step, -1))
    so_far = f"Moved so far {moved} of {end}; the unfused formula moves {format_bytes(unfused)}."
    if step == 0:
        return f"Nothing is loaded yet; tiles to visit: {len(walk.visits)}. {so_far}"
    queries, keys = walk.visits[step - 1]
    cut = "" if walk.visibility.sees_all(queries, keys) else " (the mask hides a part)"
    return (
        f"Tile {step} of {len(walk.visits)}: queries {queries.start} to {queries.stop - 1} stay on the chip, "
        f"keys and values {keys.start} to {keys.stop - 1} come in{cut}. {so_far}"
    )

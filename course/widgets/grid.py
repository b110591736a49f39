"""The programs of a launch of the Triton kernel, and the tiles that each of them visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from ipywidgets import Checkbox, IntSlider
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from course.figures import P
from course.widgets.explorer import NOW, Drawn, Stage, blocks, box, choice, corners, show
from minillm.attention.masks import Visibility, tiles

PART = "#D9A5C6"  # a tile that is visited with the mask, as in `figures.tile_map`


def program_grid(
    seqlen_q: int = 128,
    seqlen_k: int = 128,
    nheads: int = 8,
    batch: int = 2,
    *,
    block_q: int = 32,
    block_k: int = 16,
    causal: bool = True,
    program: int = 1,
) -> None:
    """Shows the programs of a launch of the Triton kernel, and the tiles that each of them visits.

    Args:
        seqlen_q, seqlen_k, nheads, batch: of the attention; every head of every sequence has the same programs.
        block_q, block_k, causal, program: where the controls start.
    """
    count = len(tiles(seqlen_q, block_q))
    slider = IntSlider(program, 0, count - 1, description="program_id(0)")
    controls = {
        "program": slider,
        "block_q": choice("block_q", blocks(seqlen_q, block_q), block_q),
        "block_k": choice("block_k", blocks(seqlen_k, block_k), block_k),
        "causal": Checkbox(causal, description="causal"),
    }

    def keep_inside(_: Any) -> None:
        last = len(tiles(seqlen_q, controls["block_q"].value)) - 1
        with slider.hold_trait_notifications():
            slider.value, slider.max = min(slider.value, last), last

    controls["block_q"].observe(keep_inside, names="value")
    draw = _grid_painter((seqlen_q, seqlen_k), (nheads, batch))
    show("The grid of programs, and the tiles that each one visits", draw, controls)


class ProgramTiles(NamedTuple):
    """What one program of the Triton kernel does.

    Attributes:
        queries: the rows that it owns.
        whole: tiles of keys that all of them see.
        masked: tiles that need the mask: on the diagonal, at a window's end, or not full.
    """

    queries: range
    whole: list[range]
    masked: list[range]


def tiles_by_program(visibility: Visibility, block_q: int, block_k: int) -> list[ProgramTiles]:
    """The programs of one head by program_id(0): the kernel gives the last tile of queries to the first one."""
    found = []
    for queries in reversed(tiles(visibility.seqlen_q, block_q)):
        seen = visibility.key_tiles(queries, block_k)
        whole = [keys for keys in seen if len(keys) == block_k and visibility.sees_all(queries, keys)]
        found.append(ProgramTiles(queries, whole, [keys for keys in seen if keys not in whole]))
    return found


def _grid_painter(seqlens: tuple[int, int], others: tuple[int, int]) -> Callable[..., Drawn]:
    """Draws the score matrix with the row of tiles that a program owns, and beside it how much every program does."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.4), width_ratios=(1.1, 1))
    matrix, frame, bars = (PolyCollection([], linewidths=width) for width in (0.8, 2.5, 0.8))
    for axes, collection in ((left, matrix), (left, frame), (right, bars)):
        axes.add_collection(collection)
    left.set(xlim=(-1, seqlens[1] + 1), ylim=(seqlens[0] + 1, -1), xlabel="key", ylabel="query")
    right.set(xlim=(0, 1.02), ylim=(1, 0), xticks=[], yticks=[])
    right.set_ylabel("programs of a head, first one above")
    titles = [axes.set_title("grid", loc="left", fontsize=10) for axes in (left, right)]
    looks = {"all queries see it: no mask": P, "with the mask": PART, "this program's": NOW}
    figure.legend(
        handles=[Patch(facecolor=c, label=t) for t, c in looks.items()],
        loc="outside lower left",
        ncols=3,
        frameon=False,
    )
    stage = Stage(figure, [matrix, frame, bars, *titles])

    def draw(program: int, block_q: int, block_k: int, causal: bool) -> Drawn:
        found = tiles_by_program(Visibility(*seqlens, causal), block_q, block_k)
        mine = found[min(program, len(found) - 1)]
        kinds = [(one.queries, keys, P) for one in found for keys in one.whole]
        kinds += [(one.queries, keys, PART) for one in found for keys in one.masked]
        matrix.set(verts=[box(rows, keys) for rows, keys, _ in kinds], edgecolor="white")
        matrix.set_facecolor([colour for _, _, colour in kinds])
        frame.set(verts=[box(mine.queries, keys) for keys in mine.whole + mine.masked])
        frame.set(facecolor="none", edgecolor=NOW)
        _draw_bars(bars, found, found.index(mine), len(tiles(seqlens[1], block_k)))
        grid = (len(found), *others)
        titles[0].set_text(f"grid {grid}: {grid[0] * grid[1] * grid[2]} programs")
        titles[1].set_text(f"tiles visited: {sum(len(one.whole) + len(one.masked) for one in found)} a head")
        return stage.png(), _in_words(mine, found.index(mine), grid)

    return draw


def _draw_bars(bars: PolyCollection, found: list[ProgramTiles], mine: int, most: int) -> None:
    """A bar a program: its whole tiles, then those with the mask."""
    boxes, colours = [], []
    for number, program in enumerate(found):
        top, bottom = (number + 0.15) / len(found), (number + 0.85) / len(found)
        whole, end = len(program.whole) / most, (len(program.whole) + len(program.masked)) / most
        boxes += [corners(0, whole, top, bottom), corners(whole, end, top, bottom)]
        colours += [NOW if number == mine else P, NOW if number == mine else PART]
    bars.set(verts=boxes, edgecolor="white")
    bars.set_facecolor(colours)


def _in_words(program: ProgramTiles, number: int, grid: tuple[int, int, int]) -> str:
    rows = program.queries
    return (
        f"Program {number} of {grid[0]} in each of {grid[1]} heads and {grid[2]} sequences owns queries {rows.start} "
        f"to {rows.stop - 1}. It visits {len(program.whole) + len(program.masked)} tiles of keys: {len(program.whole)} "
        f"without a mask, {len(program.masked)} with it."
    )

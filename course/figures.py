"""The pictures of the lessons: one palette, one meaning a colour through the whole course."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.table import Table
from torch import Tensor

from minillm.attention.masks import Visibility, tiles
from minillm.measure import GPU, GPUS, attainable, ridge

# Safe for colour-blind readers (after Okabe and Ito), each at 4.5:1 or more against white.
Q, K, V = "#0068A8", "#B84A00", "#00734F"
P, O = "#9B3F7C", "#333333"  # scores and probabilities; the output
GREY = "#6B6B6B"
RUNNING = "#00798C"  # what a walk carries along: m
UNSEEN = "#F2F2F2"  # what a mask hides
PROBABILITY = LinearSegmentedColormap.from_list("probability", ["#FFFFFF", "#E3B5D2", P, "#3D0F2E"])
METHODS = (("#B2182B", "o"), ("#00798C", "s"), ("#8A6D00", "^"), ("#111111", "D"))  # to tell methods apart

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "figure.constrained_layout.use": True,
        "svg.hashsalt": "minillm",
    }
)


def show(figure: Figure, alt: str) -> None:
    """Shows a figure as a picture with alt text, and closes it."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    plt.close(figure)
    data, metadata = picture(_few_colours(png), alt)
    display(data, raw=True, metadata=metadata)


def picture(png: bytes, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A PNG as a MIME bundle with its metadata.

    JupyterLab and nbconvert show an `image/png` without its alt text, and text/html before it. What shows no HTML, such
    as an export to LaTeX, takes the plain picture.
    """
    source = base64.b64encode(png).decode()
    img = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'
    return {"text/html": img, "image/png": png, "text/plain": alt}, {"image/png": {"alt": alt}}


def _few_colours(png: io.BytesIO) -> bytes:
    """The same with a palette of 256 colours, which a plot does not fill: a third of the bytes."""
    smaller = io.BytesIO()
    Image.open(png).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(smaller, "PNG", optimize=True)
    return smaller.getvalue()


def gpu_table() -> Table:
    """The figures of all GPUs of the roofline, a row each."""
    table = Table("GPU", "capability", "memory", "bandwidth", "SMs", "SRAM/SM", "half", "FP8", "ridge")
    for gpu in GPUS.values():
        table.add_row(
            gpu.name,
            "{}.{}".format(*gpu.compute_capability),
            f"{gpu.memory_gb} GB {gpu.memory_type}",
            f"{gpu.bandwidth / 1e12:.2f} TB/s",
            str(gpu.sms),
            f"{gpu.l1_kib} KiB",
            f"{gpu.half_flops / 1e12:.0f} TFLOP/s",
            f"{gpu.fp8_flops / 1e12:.0f} TFLOP/s" if gpu.fp8_flops else "–",
            f"{ridge(gpu):.0f}",
        )
    return table


def memory_hierarchy(gpu: GPU) -> Figure:
    """A GPU's memories as squares whose areas are to scale, drawn over each other, and the corner magnified."""
    sram = gpu.l1_kib * 1024 * gpu.sms
    sizes = {"HBM" if "HBM" in gpu.memory_type else gpu.memory_type: gpu.memory_gb * 1e9}
    if gpu.l2_mib:
        sizes["L2 cache"] = gpu.l2_mib * 2**20
    sizes["SRAM of all SMs"] = sram
    sizes["SRAM of one SM"] = gpu.l1_kib * 1024
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.2), width_ratios=(1.15, 1))
    largest = max(sizes.values())
    for axes, zoom in ((left, 1), (right, 30)):
        _squares(axes, sizes, largest, zoom)
    left.set_title(f"{gpu.name}: memories, areas to scale", fontsize=10)
    right.set_title("the lower left corner, magnified 30 times", fontsize=10)
    return figure


MEMORIES = {"L2": "#B5B5B5", "SRAM of all": "#7D7D7D", "SRAM of one": "#111111", "": "#E2E2E2"}


def _squares(axes: Axes, sizes: dict[str, float], largest: float, zoom: float) -> None:
    for name, size in sizes.items():
        colour = next(colour for start, colour in MEMORIES.items() if name.startswith(start))
        side = (size / largest) ** 0.5 * zoom
        axes.add_patch(Rectangle((0, 0), min(side, 2), min(side, 2), facecolor=colour, edgecolor="white"))
        label = f"{name}\n{_size(size)}"
        if 0.2 < side <= 1.02:
            axes.text(side - 0.02, side - 0.02, label, ha="right", va="top", fontsize=9)
        elif 0.02 < side < 0.06 and name != "L2 cache":
            arrow = {"arrowstyle": "-", "color": O, "linewidth": 0.8}
            axes.annotate(label, (side, side), (side + 0.08, side + 0.08), arrowprops=arrow, fontsize=9)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal", xticks=[], yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)


def _size(size: float) -> str:
    for unit, name in ((1e9, "GB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.0f} {name}"
    return f"{size:.0f} B"


def masks(panels: dict[str, Tensor]) -> Figure:
    """Masks side by side, {title: mask}: which keys (columns) each query (row) sees."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 2.6))
    for axis, (title, mask) in zip(axes, panels.items(), strict=True):
        rows, columns = mask.shape
        axis.imshow(mask, cmap=ListedColormap([UNSEEN, P]), vmin=0, vmax=1, aspect="equal")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="key", ylabel="query", xticks=range(columns), yticks=range(rows))
        axis.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
        axis.set_yticks([y - 0.5 for y in range(rows + 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=2)
        axis.tick_params(which="both", length=0)
    return figure


def attention_map(probabilities: Tensor, tokens: Sequence[str], title: str = "") -> Figure:
    """One head's probabilities with the tokens beside them: (seqlen, seqlen), rows are queries."""
    size = 0.2 * len(tokens) + 1.4
    figure, axes = plt.subplots(figsize=(size, size))
    axes.imshow(probabilities, cmap=PROBABILITY, vmin=0, vmax=1)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
    axes.set(xlabel="key: what is read", ylabel="query: who reads")
    axes.set_title(title, fontsize=10)
    return figure


def all_heads(probabilities: Sequence[Tensor], title: str = "") -> Figure:
    """Small maps of all heads: one row a layer, (nheads, seqlen, seqlen) each."""
    layers, heads = len(probabilities), probabilities[0].shape[0]
    figure, axes = plt.subplots(layers, heads, figsize=(1.75 * heads, 1.75 * layers))
    for layer, row in enumerate(axes):
        for head, axis in enumerate(row):
            axis.imshow(probabilities[layer][head], cmap=PROBABILITY, vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"layer {layer}, head {head}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def head_groups(designs: dict[str, tuple[int, int]]) -> Figure:
    """Which KV head each query head reads: {title: (query heads, KV heads)}."""
    figure, axes = plt.subplots(1, len(designs), figsize=(3.2 * len(designs), 1.9))
    for axis, (title, (nheads, nheads_k)) in zip(axes, designs.items(), strict=True):
        group = nheads // nheads_k
        for head in range(nheads):
            owner = (head // group + 0.5) * group - 0.5
            axis.plot([head, owner], [1, 0], color=GREY, linewidth=1, zorder=1)
            axis.scatter(head, 1, s=330, color=Q, zorder=2)
            axis.text(head, 1, f"q{head}", color="white", ha="center", va="center", fontsize=8, zorder=3)
        for head in range(nheads_k):
            owner = (head + 0.5) * group - 0.5
            axis.scatter(owner, 0, s=330, color=K, marker="s", zorder=2)
            axis.text(owner, 0, f"kv{head}", color="white", ha="center", va="center", fontsize=8, zorder=3)
        axis.set_title(title, fontsize=10)
        axis.set(xlim=(-0.7, nheads - 0.3), ylim=(-0.45, 1.45))
        axis.axis("off")
    return figure


def roofline(gpu: GPU, points: dict[str, float]) -> Figure:
    """The roof of a GPU, and where up to four pieces of work stand under it: {name: FLOPs a byte}."""
    figure, axes = plt.subplots(figsize=(8, 3.8))
    low, high = 0.1, 10_000
    intensities = [low, ridge(gpu), high]
    axes.plot(intensities, [attainable(gpu, x) / 1e12 for x in intensities], color=O, linewidth=2)
    axes.axvline(ridge(gpu), color=GREY, linestyle=":", linewidth=1)
    axes.text(ridge(gpu) * 1.1, 0.12, f"ridge: {ridge(gpu):.0f} FLOP/byte", color=GREY, fontsize=9)
    for (colour, marker), (name, intensity) in zip(METHODS, points.items(), strict=False):
        y = attainable(gpu, intensity) / 1e12
        axes.scatter(intensity, y, color=colour, marker=marker, s=60, zorder=3)
        axes.annotate(
            f"{name}\n{intensity:,.4g} FLOP/byte",
            (intensity, y),
            textcoords="offset points",
            xytext=(-9, 2) if intensity < ridge(gpu) else (-6, -30),
            ha="right" if intensity < ridge(gpu) else "left",
            color=colour,
            fontsize=9,
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(0.1, 3000))
    axes.set(xlabel="arithmetic intensity, FLOP per byte of HBM traffic", ylabel="attainable TFLOP/s")
    axes.set_title(f"{gpu.name}: datasheet limits", fontsize=10)
    return figure


def running_state(scores: Tensor, m: Tensor, l: Tensor, tokens: Sequence[str]) -> Figure:
    """The walk of the online softmax along one row: scores and running maximum above, running sum below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9.5, 4.6), sharex=True, height_ratios=(1.4, 1))
    x = range(len(scores))
    top.bar(x, scores, color=P, width=0.6, label="score")
    top.step(x, m, where="mid", color=RUNNING, linewidth=2, label="m: largest so far")
    top.set(ylabel="score")
    top.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    bottom.bar(x, l, color=GREY, width=0.6, label="l: sum of exp(score − m)")
    rises = [i for i in range(1, len(m)) if m[i] > m[i - 1]]
    for axes in (top, bottom):
        for i in rises:
            axes.axvline(i, color=RUNNING, linestyle=":", linewidth=1, zorder=0)
    bottom.set(ylabel="running sum l")
    bottom.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
    bottom.set_xticks(x, tokens, rotation=90, fontsize=8)
    return figure


def lines(curves: dict[str, tuple[Sequence[float], Sequence[float]]], xlabel: str, ylabel: str) -> Figure:
    """Up to four curves by name, {name: (x, y)}, on logarithmic axes, labelled at their right end."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for (colour, marker), (x, y) in zip(METHODS, curves.values(), strict=False):
        axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.28)
    _label_ends(axes, curves)
    return figure


def _label_ends(axes: Axes, curves: dict[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Names the curves at their right ends, from the lowest up, each above the one before."""
    free = -math.inf  # where the next name may begin, in points
    rising = sorted(zip(METHODS, curves.items(), strict=False), key=lambda curve: curve[1][1][1][-1])
    for (colour, _), (name, (x, y)) in rising:
        end = axes.transData.transform((x[-1], y[-1]))[1] * 72 / axes.figure.dpi
        up = max(0, free - end)
        axes.annotate(name, (x[-1], y[-1]), textcoords="offset points", xytext=(6, up - 3), color=colour, fontsize=9)
        free = end + up + 11


def tile_map(visibility: Visibility, block_q: int, block_k: int) -> Figure:
    """The score matrix in tiles: visited whole, visited and masked, or skipped."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    looks = {"visited": P, "visited, masked": "#D9A5C6", "skipped": UNSEEN}
    for queries in tiles(visibility.seqlen_q, block_q):
        for keys in tiles(visibility.seqlen_k, block_k):
            whole = "visited" if visibility.sees_all(queries, keys) else "visited, masked"
            name = whole if visibility.sees(queries, keys) else "skipped"
            corner = (keys.start, queries.start)
            axes.add_patch(Rectangle(corner, len(keys), len(queries), facecolor=looks[name], edgecolor="white"))
    for name, colour in looks.items():
        axes.scatter([], [], marker="s", s=90, color=colour, edgecolor=GREY, label=name)
    axes.set(xlim=(0, visibility.seqlen_k), ylim=(visibility.seqlen_q, 0), aspect="equal", xlabel="key", ylabel="query")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
    return figure


def traffic_curves(
    blocks: Sequence[int], counted: dict[str, Sequence[float]], theory: dict[str, Sequence[float]]
) -> Figure:
    """Traffic over tile sizes, the unfused formula being 1: counted as points, theory as lines."""
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for (colour, marker), name in zip(METHODS, counted, strict=False):
        axes.plot(blocks, theory[name], color=colour, linewidth=1.2)
        axes.plot(blocks, counted[name], color=colour, marker=marker, linestyle="", label=f"{name}, counted")
        axes.annotate(name, (blocks[-1], theory[name][-1]), textcoords="offset points", xytext=(8, -3), color=colour)
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.text(blocks[-1], 1.08, "unfused", color=GREY, ha="right", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="queries (FA2) or keys (FA1) in a tile", ylabel="traffic / unfused")
    axes.set_xticks(blocks, [str(block) for block in blocks])
    axes.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def pointer_tile(rows: int = 4, heads: int = 2, headdim: int = 4, head: int = 1) -> Figure:
    """Where one head's tile lies in memory: (rows, heads, headdim) in one piece, each cell with its offset."""
    figure, (strip, tile) = plt.subplots(2, 1, figsize=(9.5, 2.7), height_ratios=(1, 2.4))
    stride, count = heads * headdim, rows * heads * headdim
    for axes, cells, wide in ((strip, range(count), count), (tile, range(rows * headdim), count)):
        axes.set(xlim=(-0.2, wide + 0.2), aspect="equal", xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        for cell in cells:
            row, dim = divmod(cell, headdim)
            offset = cell if axes is strip else row * stride + head * headdim + dim
            mine = offset // headdim % heads == head
            x, y = (cell, 0) if axes is strip else (9 + dim * 1.6, -row)
            width = 1 if axes is strip else 1.6
            axes.add_patch(Rectangle((x, y), width, 1, facecolor=Q if mine else "#EDEDED", edgecolor="white"))
            colour = "white" if mine else GREY
            axes.text(x + width / 2, y + 0.5, str(offset), ha="center", va="center", fontsize=8, color=colour)
    strip.set(ylim=(-0.2, 1.2))
    strip.set_title(f"memory: {rows} rows of {heads} heads of {headdim} numbers; blue: head {head}", fontsize=10)
    tile.set(ylim=(-rows + 0.8, 2.2))
    tile.text(9 + headdim * 0.8, 1.5, "dim 0 … 3", ha="center", fontsize=9, color=GREY)
    for row in range(rows):
        text = f"row {row}: {head} · {headdim} + {row} · {stride} + dim"
        tile.text(8.6, -row + 0.5, text, ha="right", va="center", fontsize=9, color=GREY)
    tile.text(9 + headdim * 1.6 + 0.6, -rows / 2 + 1, "the tile that tl.load brings", va="center", fontsize=9, color=Q)
    return figure


def rates(published: dict[str, dict[str, float]], measured: dict[str, dict[str, float]], source: str) -> Figure:
    """Bars of TFLOP/s by method, one group a case: what others published in grey, beside it what was measured here.

    Args:
        published: by method, then by case.
        measured: by method, then by case, as far as it was measured. Ours is the last one.
        source: of the published ones.
    """
    figure, axes = plt.subplots(figsize=(8.5, 3.4))
    names = [*published, *measured]
    cases = list(next(iter(published.values())))
    colours = [GREY] * len(published) + [METHODS[2][0]] * (len(measured) - 1) + [METHODS[1][0]]
    for i, case in enumerate(cases):
        for j, (name, colour) in enumerate(zip(names, colours, strict=True)):
            x = i * (len(names) + 1) + j
            value = (published | measured)[name].get(case)
            axes.bar(x, value or 0, color=colour, width=0.85)
            label = f"{value:.0f}" if value else "not measured yet"
            axes.text(x, (value or 0) + 8, label, ha="center", fontsize=9, rotation=0 if value else 90, va="bottom")
    places = [i * (len(names) + 1) + j for i in range(len(cases)) for j in range(len(names))]
    axes.set_xticks(places, names * len(cases), rotation=30, ha="right", fontsize=9)
    for i, case in enumerate(cases):
        axes.text(i * (len(names) + 1) + (len(names) - 1) / 2, 740, case, ha="center", fontsize=10)
    axes.set(ylabel="TFLOP/s", ylim=(0, 790))
    axes.set_title(source, fontsize=9, color=GREY, loc="left")
    return figure

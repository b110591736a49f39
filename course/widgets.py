"""Pictures that follow their controls: attention maps, the online softmax, the walk over tiles, the KV cache.

Each widget is also stored as a picture, for pages where nothing runs (GitHub, exported HTML, print). The call is shown
at once and returns nothing, like `figures.show`.
"""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from ipywidgets import HTML, Checkbox, HBox, Image, IntSlider, Layout, SelectionSlider, ValueWidget, VBox
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from course import figures
from course.figures import GREY, RUNNING, K, O, P, Q, V
from minillm.attention.masks import Visibility, tiles
from minillm.attention.online import OnlineSoftmax
from minillm.attention.tiled import Tiling, tiled_forward
from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.measure import Traffic, count_operators, count_traffic, format_bytes

NOW = "#3D0F2E"  # the score or the tile of this step: the dark end of `figures.PROBABILITY`

Drawn = tuple[bytes, str]  # a PNG, and the same in words


def attention_maps(probabilities: Sequence[Tensor], tokens: Sequence[str], *, layer: int = 0, head: int = 0) -> None:
    """Shows the attention map of a head; layer and head can be chosen.

    Args:
        probabilities: (nheads, n, n) for each layer; rows are queries.
        tokens: a label for each of the n tokens.
        layer, head: where it starts, and what the stored picture shows.

    Raises:
        ValueError: where the shapes do not belong together.
    """
    shape = (probabilities[0].shape[0], len(tokens), len(tokens))
    if any(heads.shape != shape for heads in probabilities):
        raise ValueError(f"probabilities {[tuple(p.shape) for p in probabilities]}, want {shape} for each layer")
    figure = figures.attention_map(probabilities[layer][head], tokens, f"layer {layer}, head {head}")
    axes = figure.axes[0]
    stage = _Stage(figure, [axes.images[0], axes.title])

    def draw(layer: int, head: int) -> Drawn:
        weights = probabilities[layer][head]
        axes.images[0].set_data(weights.tolist())
        axes.title.set_text(f"layer {layer}, head {head}")
        key = int(weights[-1].argmax())
        words = (
            f"Layer {layer}, head {head}: the last query, «{tokens[-1]}», gives its largest weight, "
            f"{weights[-1, key]:.2f}, to «{tokens[key]}» (token {key + 1} of {len(tokens)})."
        )
        return stage.png(), words

    controls = {
        "layer": _choice("layer", range(len(probabilities)), layer),
        "head": _choice("head", range(shape[0]), head),
    }
    display(Explorer("Attention map by layer and head", draw, controls))


def online_softmax(
    scores: Tensor, tokens: Sequence[str], values: Tensor | None = None, *, step: int | None = None
) -> None:
    """Shows the online softmax on its way along one row of scores, with a slider for how many it has seen.

    Args:
        scores: (n,), -inf where masked, at least one not.
        tokens: a label for each of the n keys.
        values: (n, headdim); with them, acc is shown too.
        step: how many scores are seen at the start, and in the stored picture; left out, the largest is the last seen.

    Raises:
        ValueError: where scores and tokens do not belong together, or all are masked.
    """
    if scores.shape != (len(tokens),) or not scores.isfinite().any():
        raise ValueError(f"want one score for each of {len(tokens)} tokens, not all masked; got {tuple(scores.shape)}")
    draw = _stepper(scores, tokens, online_states(scores, values), with_acc=values is not None)
    first = int(scores.argmax()) + 1 if step is None else step
    controls = {"step": IntSlider(first, 0, len(scores), description="scores seen")}
    display(Explorer("Online softmax, score by score", draw, controls))


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
        "block_q": _choice("block_q", _blocks(seqlen_q, block_q), block_q),
        "block_k": _choice("block_k", _blocks(seqlen_k, block_k), block_k),
        "causal": Checkbox(causal, description="causal"),
    }

    def same_share(_: Any) -> None:
        """Another tiling has another number of steps; who stood at the end shall stand there again."""
        count = len(counted_walk(*size, *(controls[name].value for name in ("block_q", "block_k", "causal"))).visits)
        share = steps.value / steps.max
        with steps.hold_trait_notifications():
            steps.max, steps.value = count, round(share * count)

    for name in ("block_q", "block_k", "causal"):
        controls[name].observe(same_share, names="value")
    smallest = (min(_blocks(seqlen_q, block_q)), min(_blocks(seqlen_k, block_k)))
    display(Explorer("FlashAttention: tiles visited, bytes moved", _walker(size, smallest), controls))


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
        "capacity": _choice("capacity", sizes, capacity),
        "heads_k": _choice("KV heads", (1, 2, 4), 2),
    }
    display(Explorer("The KV cache fills", _filler(tuple(prompts), new_tokens), controls))


def _choice(name: str, options: Sequence[int], start: int) -> SelectionSlider:
    """A few numbers to choose from: in a list, JupyterLab takes the arrow keys for itself; in a slider it does not."""
    return SelectionSlider(options=list(options), value=start, description=name, layout=Layout(margin="2px"))


class Explorer(VBox):
    """Controls, the picture that follows them, and what it shows in words (read aloud by a screen reader).

    Its MIME bundle has the picture beside the widget: a front end shows what it can.

    Args:
        label: what it is, in a few words.
        draw: called with the controls' values by name.
        controls: by name.
    """

    def __init__(self, label: str, draw: Callable[..., Drawn], controls: dict[str, ValueWidget]):
        self.controls = controls
        self._draw = draw
        self._shown: dict[str, Any] = {}
        # In a column, an image is stretched to its width unless told otherwise.
        self.picture = Image(format="png", layout=Layout(max_width="100%", height="auto", align_self="flex-start"))
        self.text = HTML()
        self.alt = ""
        for control in controls.values():
            control.style.description_width = "initial"
            control.observe(self._redraw, names="value")
        row = HBox(list(controls.values()), layout=Layout(flex_flow="row wrap"))
        super().__init__([HTML(f"<strong>{html.escape(label)}</strong>"), row, self.picture, self.text])
        self._redraw()

    def _redraw(self, _: Any = None) -> None:
        values = {name: control.value for name, control in self.controls.items()}
        if values == self._shown:  # a control that moved another has been drawn already
            return
        self._shown = values
        self.picture.value, self.alt = self._draw(**values)
        # An Image has no alt text (and with a tooltip ipywidgets 8.1 cannot show it): the words under it are its text.
        self.text.value = f'<div aria-live="polite">{html.escape(self.alt)}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        png = bytes(self.picture.value)  # the trait holds a memoryview, which JSON would list number by number
        data, metadata = figures.picture(png, self.alt)
        return {**super()._repr_mimebundle_(**kwargs), **data}, metadata


class _Stage:
    """A figure of which only the moving parts are drawn again: labels and layout take most of the time."""

    def __init__(self, figure: Figure, moving: Sequence[Artist]):
        plt.close(figure)  # or the notebook would show it
        self._canvas = FigureCanvasAgg(figure)
        self._moving = moving
        for artist in moving:
            artist.set_animated(True)
        self._canvas.draw()
        figure.set_layout_engine("none")
        self._scenery = self._canvas.copy_from_bbox(figure.bbox)

    def png(self) -> bytes:
        self._canvas.restore_region(self._scenery)
        for artist in self._moving:
            artist.draw(self._canvas.get_renderer())
        picture = io.BytesIO()
        imsave(picture, self._canvas.buffer_rgba(), format="png")
        return picture.getvalue()


class State(NamedTuple):
    """What the online softmax carries after a score, and by how much that score rescaled it."""

    m: float
    l: float
    acc: Tensor
    rescale: float


def online_states(scores: Tensor, values: Tensor | None = None) -> list[State]:
    """The states before the first score and after each: `OnlineSoftmax`, run on one score at a time.

    Args:
        scores: (n,), -inf where masked.
        values: (n, headdim); without them acc is empty.
    """
    values = scores.new_zeros(len(scores), 0) if values is None else values
    online = OnlineSoftmax((1,), values.shape[1], torch.promote_types(scores.dtype, torch.float32))
    states = [State(online.m.item(), online.l.item(), online.acc[0], 1.0)]
    for score, value in zip(scores.to(online.m.dtype), values.to(online.m.dtype), strict=True):
        before = online.m
        online.update(score.view(1, 1), value[None])
        rescale = 1.0 if before.equal(online.m) else torch.exp(before - online.m).item()
        states.append(State(online.m.item(), online.l.item(), online.acc[0], rescale))
    return states


def _stepper(scores: Tensor, tokens: Sequence[str], states: list[State], with_acc: bool) -> Callable[[int], Drawn]:
    """Draws a state: the scores, the weights that add up to l, and acc where there are values."""
    figure, rows = plt.subplots(2 + with_acc, 1, figsize=(9, 4.4 + 1.4 * with_acc))
    bars, maximum = _score_row(rows[0], scores)
    weights, before = _weight_row(rows[1], tokens)
    acc = _acc_row(rows[2], states) if with_acc else []
    titles = [row.set_title("m", loc="left", fontsize=10) for row in rows]
    stage = _Stage(figure, [*bars, maximum, *before, *weights, *acc, *titles])

    def draw(step: int) -> Drawn:
        state, last = states[step], states[max(0, step - 1)]
        rescaled = last.l > 0 and state.rescale < 1
        for i, (bar, weight, old) in enumerate(zip(bars, weights, before, strict=True)):
            colour = "white" if i >= step else NOW if i == step - 1 else P
            bar.set(facecolor=colour, edgecolor=GREY if i >= step else colour)
            weight.set(height=_weight(scores[i], state.m) if i < step else 0, facecolor=colour)
            height = _weight(scores[i], last.m) if i < step - 1 and rescaled else 0
            old.set(height=height, visible=height > 0)
        maximum.set_data([i - 0.5 for i in range(step + 1)], [s.m for s in states[1 : step + 1]] + [state.m])
        for bar, height in zip(acc, state.acc.tolist(), strict=False):
            bar.set_height(height)
        titles[0].set_text(f"scores; the line is the largest so far: m = {_number(state.m)}")
        change = f"× {state.rescale:.4f} in this step (dashed: before)" if rescaled else "no rescale in this step"
        titles[1].set_text(f"exp(score − m), adding up to l = {state.l:.2f}; {change}")
        if with_acc:
            titles[2].set_text("acc: the sum of exp(score − m) · value, a bar for each dimension")
        return stage.png(), _in_words(step, scores, tokens, states)

    return draw


def _score_row(axes: Axes, scores: Tensor) -> tuple[list[Rectangle], Line2D]:
    """Bars for the scores, and the line of their running maximum."""
    visible = scores[scores.isfinite()]
    bars = axes.bar(range(len(scores)), scores.masked_fill(~scores.isfinite(), 0).tolist(), width=0.6)
    for i in torch.nonzero(~scores.isfinite()).flatten().tolist():
        axes.text(i, 0, "−∞", color=GREY, ha="center", va="bottom", fontsize=8)
    (maximum,) = axes.plot([], [], color=RUNNING, linewidth=2, drawstyle="steps-post")
    low, high = min(0.0, visible.min().item()), max(0.0, visible.max().item())
    axes.set(xlim=(-0.7, len(scores) - 0.3), ylim=(low - 0.08 * (high - low), high + 0.08 * (high - low)), xticks=[])
    return list(bars), maximum


def _weight_row(axes: Axes, tokens: Sequence[str]) -> tuple[list[Rectangle], list[Rectangle]]:
    """Bars for the weights now, and dashed outlines for what they were before the rescale."""
    x = range(len(tokens))
    weights = axes.bar(x, [0] * len(tokens), width=0.6)
    before = axes.bar(x, [0] * len(tokens), width=0.6, facecolor="none", edgecolor=GREY, linestyle="--")
    axes.set(xlim=(-0.7, len(tokens) - 0.3), ylim=(0, 1.06))
    axes.set_xticks(x, tokens, rotation=90, fontsize=8)
    return list(weights), list(before)


def _acc_row(axes: Axes, states: list[State]) -> list[Rectangle]:
    largest = max(state.acc.abs().max().item() for state in states) or 1.0
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylim=(-1.05 * largest, 1.05 * largest), xlim=(-0.7, len(states[0].acc) - 0.3))
    axes.set_xlabel("dimension of the value", fontsize=9)
    return list(axes.bar(range(len(states[0].acc)), states[0].acc.tolist(), width=0.6, color=O))


def _weight(score: Tensor, m: float) -> float:
    return torch.exp(score - m).item() if score.isfinite() else 0.0


def _in_words(step: int, scores: Tensor, tokens: Sequence[str], states: list[State]) -> str:
    if step == 0:
        return "Nothing is seen yet: m = −∞ and l = 0."
    last, state, score = states[step - 1], states[step], scores[step - 1].item()
    words = f"Score {step} of {len(scores)}, «{tokens[step - 1]}», is {_number(score)}"
    if score == -torch.inf:
        words += " (masked): its weight is 0, and nothing changes."
    elif last.l == 0:
        words += ", the first that counts: m is this score, and l = exp(0) = 1."
    elif state.m > last.m:
        words += (
            f", larger than m = {_number(last.m)}. The rescale is exp({_difference(last.m, state.m)}) ≈ "
            f"{state.rescale:.4f}, the new weight exp(0) = 1: "
            f"l = {state.rescale:.4f} · {last.l:.2f} + 1 ≈ {state.l:.2f}."
        )
    else:
        weight = f"{_weight(scores[step - 1], state.m):.4f}"
        words += (
            f", not larger than m = {_number(state.m)}. The rescale is 1, "
            f"the new weight exp({_difference(score, state.m)}) ≈ {weight}: "
            f"l = {last.l:.2f} + {weight} ≈ {state.l:.2f}."
        )
    return words + (" All are seen: weight / l is the softmax." if step == len(scores) else "")


def _number(x: float) -> str:
    return f"{x:.3f}".replace("-", "−").replace("inf", "∞")


def _difference(a: float, b: float) -> str:
    return f"{_number(a)} − {_number(b)}" if b >= 0 else f"{_number(a)} + {_number(-b)}"


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
    """Listens to what comes onto the chip: a tile of queries opens a walk, acc closes a tile."""
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


def _blocks(seqlen: int, start: int) -> list[int]:
    return sorted({start, *(block for block in (16, 32, 64, 128) if block <= max(16, seqlen))})


COLOURS = {"q": Q, "k": K, "v": V, "out": O, "lse": GREY}  # of the counter's parts


def _walker(size: tuple[int, int, int], smallest: tuple[int, int]) -> Callable[..., Drawn]:
    """Draws the tiles of a walk, and the counter beside them, which has room for what the smallest tiles move."""
    largest = max(unfused_bytes(*size), counted_walk(*size, *smallest, causal=False).moved[-1].total())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.9), width_ratios=(1.1, 1))
    matrix, counter = _Matrix(left, *size[:2]), _CounterBars(right, size, largest)
    figure.legend(handles=_legend(), loc="outside lower left", ncols=5, frameon=False, fontsize=9)
    stage = _Stage(figure, [*matrix.moving, *counter.moving])

    def draw(step: int, block_q: int, block_k: int, causal: bool) -> Drawn:
        walk = counted_walk(*size, block_q, block_k, causal)
        matrix.update(walk, step, block_q, block_k)
        counter.update(walk, step)
        return stage.png(), _walk_in_words(walk, step, unfused_bytes(*size))

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
        self._tiles.set_verts([_box(*tile) for tile in grid])
        colours = [_tile_colour(order.get(tile), step) for tile in grid]
        self._tiles.set(facecolor=colours, edgecolor=[GREY if colour == "white" else "white" for colour in colours])
        cut = [tile for tile in order if not walk.visibility.sees_all(*tile)]
        self._hidden.set_verts([_hidden_part(*tile, walk.visibility) for tile in cut])
        skipped = [tile for tile in grid if tile not in order]
        self._skipped.set_data([_middle(keys) for _, keys in skipped], [_middle(rows) for rows, _ in skipped])
        self._frame.set_verts([_box(*tile) for tile in now])
        self._in_use.set_verts([box for rows, keys in now for box in self._sides(rows, keys)])
        last = {rows: number for (rows, _), number in order.items()}  # of each walk, the number of its last tile
        self._written.set_verts([self._output(rows) for rows, number in last.items() if number <= step])

    def _sides(self, rows: range, keys: range) -> list[list[tuple[float, float]]]:
        """Where the tiles of Q, K and V stand that are on the chip."""
        above, beside = (length / 100 for length in self._seqlens)
        q = _corners(-9 * beside, -3 * beside, rows.start, rows.stop)
        k = _corners(keys.start, keys.stop, -17 * above, -11 * above)
        v = _corners(keys.start, keys.stop, -9 * above, -3 * above)
        return [q, k, v]

    def _output(self, rows: range) -> list[tuple[float, float]]:
        width = self._seqlens[1] / 100
        return _corners(103 * width, 109 * width, rows.start, rows.stop)

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


def _box(queries: range, keys: range) -> list[tuple[float, float]]:
    return _corners(keys.start, keys.stop, queries.start, queries.stop)


def _corners(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _middle(positions: range) -> float:
    return (positions.start + positions.stop) / 2


def _walk_in_words(walk: Walk, step: int, unfused: int) -> str:
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


class Program(NamedTuple):
    """What one program of the Triton kernel does.

    Attributes:
        queries: the rows that it owns.
        whole: tiles of keys that all of them see.
        masked: tiles that need the mask: on the diagonal, at a window's end, or not full.
    """

    queries: range
    whole: list[range]
    masked: list[range]


def programs(visibility: Visibility, block_q: int, block_k: int) -> list[Program]:
    """The programs of one head by program_id(0): the kernel gives the last tile of queries to the first one."""
    found = []
    for queries in reversed(tiles(visibility.seqlen_q, block_q)):
        seen = visibility.key_tiles(queries, block_k)
        whole = [keys for keys in seen if len(keys) == block_k and visibility.sees_all(queries, keys)]
        found.append(Program(queries, whole, [keys for keys in seen if keys not in whole]))
    return found


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
        "block_q": _choice("block_q", _blocks(seqlen_q, block_q), block_q),
        "block_k": _choice("block_k", _blocks(seqlen_k, block_k), block_k),
        "causal": Checkbox(causal, description="causal"),
    }

    def keep_inside(_: Any) -> None:
        last = len(tiles(seqlen_q, controls["block_q"].value)) - 1
        with slider.hold_trait_notifications():
            slider.value, slider.max = min(slider.value, last), last

    controls["block_q"].observe(keep_inside, names="value")
    draw = _grid_painter((seqlen_q, seqlen_k), (nheads, batch))
    display(Explorer("The grid of programs, and the tiles that each one visits", draw, controls))


PART = "#D9A5C6"  # a tile that is visited with the mask, as in `figures.tile_map`


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
    stage = _Stage(figure, [matrix, frame, bars, *titles])

    def draw(program: int, block_q: int, block_k: int, causal: bool) -> Drawn:
        found = programs(Visibility(*seqlens, causal), block_q, block_k)
        mine = found[min(program, len(found) - 1)]
        kinds = [(one.queries, keys, P) for one in found for keys in one.whole]
        kinds += [(one.queries, keys, PART) for one in found for keys in one.masked]
        matrix.set(verts=[_box(rows, keys) for rows, keys, _ in kinds], edgecolor="white")
        matrix.set_facecolor([colour for _, _, colour in kinds])
        frame.set(verts=[_box(mine.queries, keys) for keys in mine.whole + mine.masked])
        frame.set(facecolor="none", edgecolor=NOW)
        _draw_bars(bars, found, found.index(mine), len(tiles(seqlens[1], block_k)))
        grid = (len(found), *others)
        titles[0].set_text(f"grid {grid}: {grid[0] * grid[1] * grid[2]} programs")
        titles[1].set_text(f"tiles visited: {sum(len(one.whole) + len(one.masked) for one in found)} a head")
        return stage.png(), _program_in_words(mine, found.index(mine), grid)

    return draw


def _draw_bars(bars: PolyCollection, found: list[Program], mine: int, most: int) -> None:
    """A bar a program: its whole tiles, then those with the mask."""
    boxes, colours = [], []
    for number, program in enumerate(found):
        top, bottom = (number + 0.15) / len(found), (number + 0.85) / len(found)
        whole, end = len(program.whole) / most, (len(program.whole) + len(program.masked)) / most
        boxes += [_corners(0, whole, top, bottom), _corners(whole, end, top, bottom)]
        colours += [NOW if number == mine else P, NOW if number == mine else PART]
    bars.set(verts=boxes, edgecolor="white")
    bars.set_facecolor(colours)


def _program_in_words(program: Program, number: int, grid: tuple[int, int, int]) -> str:
    rows = program.queries
    return (
        f"Program {number} of {grid[0]} in each of {grid[1]} heads and {grid[2]} sequences owns queries {rows.start} "
        f"to {rows.stop - 1}. It visits {len(program.whole) + len(program.masked)} tiles of keys: {len(program.whole)} "
        f"without a mask, {len(program.masked)} with it."
    )


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
            cache.update(new, new, layer, counts)
        states.append(_state(cache))
    return states


def _state(cache: KVCache) -> Filling:
    used = cache.nbytes * sum(cache.lengths) // (cache.batch_size * cache.capacity)
    return Filling(cache.lengths, cache.capacity, cache.nbytes, used)


PREFILLED, DECODED = K, "#E8B48A"  # slots hold keys (and values): the keys' colour, and a lighter one


def _filler(prompts: tuple[int, ...], new_tokens: int) -> Callable[..., Drawn]:
    """Draws the slots of each row, and under them the bytes over the forwards so far."""
    limit = max(prompts) + new_tokens
    figure, (above, below) = plt.subplots(2, 1, figsize=(9.4, 4.6), height_ratios=(1.1, 1))
    slots = [(row, slot) for row in range(len(prompts)) for slot in range(limit)]
    grid = PolyCollection([_box(range(r, r + 1), range(s, s + 1)) for r, s in slots], linewidths=0.8)
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
    stage = _Stage(figure, [grid, title, allocated, used])

    def draw(step: int, capacity: int, heads_k: int) -> Drawn:
        states = filled_cache(prompts, new_tokens, capacity, heads_k)
        state, before = states[step], states[max(0, step - 1)]
        colours = [_slot_colour(r, s, state, before, prompts) for r, s in slots]
        outside = [s >= state.capacity for _, s in slots]
        grid.set(facecolor=colours, edgecolor=["#E8E8E8" if out else GREY for out in outside])
        title.set_text(f"capacity: {state.capacity} slots a row, {sum(state.lengths)} used in all")
        allocated.set_data(range(step + 1), [s.nbytes / 1024 for s in states[: step + 1]])
        used.set_data(range(step + 1), [s.used / 1024 for s in states[: step + 1]])
        words = _filling_in_words(step, state, before, heads_k)
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


def _filling_in_words(step: int, state: Filling, before: Filling, heads_k: int) -> str:
    sizes = f"{format_bytes(state.used)} of {format_bytes(state.nbytes)} are used, with KV heads: {heads_k}."
    if step == 0:
        return f"Nothing is computed yet: {state.capacity} slots a row are allocated. {sizes}"
    lengths = ", ".join(map(str, state.lengths))
    what = "Prefill: all rows at once" if step == 1 else f"Decode step {step - 1}: one token a row"
    grew = f" It was full: {before.capacity} slots became {state.capacity}." if state.capacity > before.capacity else ""
    return f"{what}. The rows hold {lengths} tokens.{grew} {sizes}"

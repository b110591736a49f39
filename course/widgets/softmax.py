"""The online softmax on its way along a row of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from ipywidgets import IntSlider
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from course.figures import GREY, RUNNING, O, P
from course.widgets.explorer import NOW, Drawn, Stage, show
from minillm.attention.online import OnlineSoftmax


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
    show("Online softmax, score by score", draw, controls)


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
    stage = Stage(figure, [*bars, maximum, *before, *weights, *acc, *titles])

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
    words = f"Score {step} of {len(scores)}, “{tokens[step - 1]}”, is {_number(score)}"
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

"""The attention map of each layer and head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from course import figures
from course.widgets.explorer import Drawn, Stage, choice, show


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
    stage = Stage(figure, [axes.images[0], axes.title])

    def draw(layer: int, head: int) -> Drawn:
        weights = probabilities[layer][head]
        axes.images[0].set_data(weights.tolist())
        axes.title.set_text(f"layer {layer}, head {head}")
        key = int(weights[-1].argmax())
        words = (
            f"Layer {layer}, head {head}: the last query, “{tokens[-1]}”, gives its largest weight, "
            f"{weights[-1, key]:.2f}, to “{tokens[key]}” (token {key + 1} of {len(tokens)})."
        )
        return stage.png(), words

    controls = {
        "layer": choice("layer", range(len(probabilities)), layer),
        "head": choice("head", range(shape[0]), head),
    }
    show("Attention map by layer and head", draw, controls)

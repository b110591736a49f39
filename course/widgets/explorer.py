"""What all widgets are made of: controls, the picture that follows them, and a text that says what it shows."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from IPython.display import display
from ipywidgets import HTML, HBox, Image, Layout, SelectionSlider, ValueWidget, VBox
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave

from course import figures

NOW = "#3D0F2E"  # the score or the tile of this step: the dark end of `figures.PROBABILITY`

Drawn = tuple[bytes, str]  # a PNG, and the text that says what it shows


def show(label: str, draw: Callable[..., Drawn], controls: dict[str, ValueWidget]) -> None:
    """Displays an `Explorer`, which has the arguments described."""
    display(Explorer(label, draw, controls))


class Explorer(VBox):
    """Controls, the picture that follows them, and a text that says what it shows (read aloud by a screen reader).

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


class Stage:
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
        """The figure as it is now."""
        self._canvas.restore_region(self._scenery)
        for artist in self._moving:
            artist.draw(self._canvas.get_renderer())
        picture = io.BytesIO()
        imsave(picture, self._canvas.buffer_rgba(), format="png")
        return picture.getvalue()


def choice(name: str, options: Sequence[int], start: int) -> SelectionSlider:
    """A few numbers to choose from: in a list, JupyterLab takes the arrow keys for itself; in a slider it does not."""
    return SelectionSlider(options=list(options), value=start, description=name, layout=Layout(margin="2px"))


def blocks(seqlen: int, start: int) -> list[int]:
    """The sizes of a tile that its control offers, `start` among them."""
    return sorted({start, *(block for block in (16, 32, 64, 128) if block <= max(16, seqlen))})


def box(queries: range, keys: range) -> list[tuple[float, float]]:
    """The corners of a tile in the score matrix."""
    return corners(keys.start, keys.stop, queries.start, queries.stop)


def corners(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    """The corners (x, y) of a rectangle, in order."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]

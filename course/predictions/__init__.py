"""Predictions: a question before a number appears; the answer and its reason appear after a choice.

The questions of lesson NN stand in NN.toml, so that a cell `predict("03 tail")` gives nothing away.
"""

from __future__ import annotations

import html
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from IPython.display import display
from ipywidgets import HTML, Button, Layout, VBox

from course.tasks.progress import note

FOLDER = Path(__file__).parent


class Question(NamedTuple):
    """What is asked before a number or a shape appears; `right` is one of `choices`, and `because` says why."""

    question: str
    choices: list[str]
    right: str
    because: str


def predict(name: str) -> None:
    """Asks a question with a few answers to choose from; the right one and its reason appear after the choice.

    Args:
        name: the lesson's number and the question's name, as in "03 tail".

    Raises:
        ValueError: there is no such question.
    """
    if name not in names():
        raise ValueError(f"no prediction is called {name}: one of {', '.join(names())}")
    display(Prediction(name, questions(name[:2])[name[3:]]))


def names() -> list[str]:
    """All predictions, lesson by lesson."""
    lessons = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return [f"{lesson} {name}" for lesson in lessons for name in questions(lesson)]


@cache
def questions(lesson: str) -> dict[str, Question]:
    """The questions of a lesson by name, in the order in which they are asked.

    Raises:
        ValueError: the file is no TOML, or a question has other fields than `Question`.
    """
    with open(FOLDER / f"{lesson}.toml", "rb") as file:
        try:
            return {name: Question(**asked) for name, asked in tomllib.load(file).items()}
        except (tomllib.TOMLDecodeError, TypeError) as error:
            raise ValueError(f"course/predictions/{lesson}.toml: {error}") from None


class Prediction(VBox):
    """A question with a button for each answer. Its MIME bundle also has it as a page on which the answer folds out.

    Args:
        name: under which the first choice is noted for `progress`.
        asked: the question.
    """

    def __init__(self, name: str, asked: Question):
        self.name, self.asked = name, asked
        # Buttons, not a list: each is reached by Tab and pressed by Enter, and nothing is chosen on the way.
        self.buttons = [Button(description=choice, layout=Layout(width="auto")) for choice in asked.choices]
        self.verdict = HTML()
        for button in self.buttons:
            button.on_click(self._choose)
        super().__init__([HTML(_question(asked)), *self.buttons, self.verdict])

    def _choose(self, button: Button) -> None:
        right = button.description == self.asked.right
        note(f"predict {self.name}", "right" if right else "wrong")
        begins = f"Yes: {self.asked.right}." if right else f"Not {button.description}: it is {self.asked.right}."
        words = html.escape(f"{begins} {self.asked.because}")
        self.verdict.value = f'<div aria-live="polite" style="line-height:1.5">{words}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        choices = "".join(f"<li>{html.escape(choice)}</li>" for choice in self.asked.choices)
        answer = html.escape(f"{self.asked.right}. {self.asked.because}")
        page = f"{_question(self.asked)}<ul>{choices}</ul><details><summary>The answer</summary>{answer}</details>"
        text = f"Predict: {self.asked.question} {' / '.join(self.asked.choices)}"
        return {**super()._repr_mimebundle_(**kwargs), "text/html": page, "text/plain": text}


def _question(asked: Question) -> str:
    return f"<p><strong>Predict.</strong> {html.escape(asked.question)}</p>"

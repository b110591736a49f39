"""What lessons and exercises need: the doctor, pictures, widgets, helpers, and the tasks with their checks."""

from importlib import import_module
from typing import Any

_PLACES = {
    "check": "course.answers",
    "predict": "course.predictions",
    "progress": "course.answers",
    "solution": "course.answers",
}
__all__ = ["check", "predict", "progress", "solution"]


def __getattr__(name: str) -> Any:
    """What lessons call, imported when first used: `course.colab` runs before what they need is there."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'course' has no attribute {name!r}")

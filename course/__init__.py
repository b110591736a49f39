"""What lessons and exercises need: the doctor, pictures, widgets, helpers, and the tasks with their checks."""

from typing import Any

__all__ = ["check", "progress"]


def __getattr__(name: str) -> Any:
    """`check` and `progress`, imported when first used: `course.colab` runs before what they need is there."""
    if name in __all__:
        from course import tasks

        return getattr(tasks, name)
    raise AttributeError(f"module 'course' has no attribute {name!r}")

"""The writing stops: a few lines that a lesson asks for, before it shows how the package does it. One file a lesson."""

from __future__ import annotations

from course.stops import naive_attention
from course.tasks.task import Task

UNITS: tuple = (naive_attention,)
STOPS: dict[str, Task] = {task.name: task for unit in UNITS for task in unit.STOPS}

"""The writing stops: a few lines that a lesson asks for, before it shows how the package does it. One file a lesson."""

from __future__ import annotations

from course.stops import kv_cache, naive_attention, online_softmax, tiling, triton_flash_attention
from course.tasks.task import Task

UNITS = (naive_attention, online_softmax, tiling, kv_cache, triton_flash_attention)
STOPS: dict[str, Task] = {task.name: task for unit in UNITS for task in unit.STOPS}

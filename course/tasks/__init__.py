"""The exercises: what each task asks, and how an answer is judged. One file for each unit of `solutions/`."""

from __future__ import annotations

from course.tasks import kv_cache, naive_attention, online_softmax, tiling, triton_flash_attention
from course.tasks.task import Case, CheckResult, NotYet, Task, fresh_inputs, run

__all__ = ["CHECKLISTS", "TASKS", "Case", "NotYet", "CheckResult", "Task", "fresh_inputs", "run"]

UNITS = (naive_attention, online_softmax, tiling, kv_cache, triton_flash_attention)
TASKS: dict[str, Task] = {task.name: task for unit in UNITS for task in unit.TASKS}
# Questions in words, by the id of their cell: the points by which a reader marks an answer of their own.
CHECKLISTS: dict[str, list[str]] = {
    name: points for unit in UNITS for name, points in getattr(unit, "CHECKLISTS", {}).items()
}

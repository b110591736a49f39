"""The exercises: what each task asks, and how an answer is judged. One file for each unit of `solutions/`."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from course.tasks import kv_cache, naive_attention, online_softmax, tiling, triton_flash_attention
from course.tasks import progress as _progress
from course.tasks.task import Case, CheckResult, NotYet, Task, fresh_inputs, run

__all__ = ["TASKS", "Case", "NotYet", "CheckResult", "Task", "check", "fresh_inputs", "progress"]

UNITS = (naive_attention, online_softmax, tiling, kv_cache, triton_flash_attention)
TASKS: dict[str, Task] = {task.name: task for unit in UNITS for task in unit.TASKS}


def check(function: Callable, *what: str | Case) -> CheckResult:
    """Runs your answer on a task's cases, and says what is not right yet.

    Args:
        function: your answer. Its name says which task it is.
        what: the parts of the task to look at, or cases; all parts when left out.

    Returns:
        What was right, as text.

    Raises:
        NotYet: with the case, what was expected, and the likely bug by name.
        ValueError: no task, or no part of it, has this name.
    """
    name = getattr(function, "__name__", repr(function))
    if name not in TASKS:
        raise ValueError(f"no task is called {name}: name your function after its task, one of {', '.join(TASKS)}")
    task = TASKS[name]
    if not what:
        result = run(task, function, task.cases())
        _progress.mark_done(task.name)
        return result
    chosen = [case for part in what for case in ([part] if isinstance(part, Case) else task.cases(part))]
    return run(task, function, chosen)


def progress() -> Table:
    """Which exercises you have done, as a table."""
    return _progress.table(list(TASKS.values()))

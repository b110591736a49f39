"""Which exercises are done, on this machine: kept in `.progress.json` beside the course."""

from __future__ import annotations

import json
import os
from datetime import date
from pathlib import Path

from rich.table import Table

from course.tasks.task import Task

# The variable is for tests, which must not tick off your exercises.
FILE = Path(os.environ.get("MINILLM_PROGRESS", Path(__file__).resolve().parents[2] / ".progress.json"))


def mark_done(name: str) -> None:
    """Notes that a task is done today; one that was done before keeps its day."""
    done = {name: date.today().isoformat()} | read()
    part = FILE.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(done, indent=1), encoding="utf-8")
    part.replace(FILE)  # a crash in between leaves the old file whole


def read() -> dict[str, str]:
    """The day on which each task was done, by its name."""
    try:
        done = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) else {}


def table(tasks: list[Task]) -> Table:
    """The tasks with their minutes and difficulty, and the day on which each was done."""
    done = read()
    result = Table(title=f"{sum(task.name in done for task in tasks)} of {len(tasks)} exercises done")
    for column in ("", "unit", "task", "minutes", "difficulty", "done"):
        result.add_column(column, justify="right" if column == "minutes" else "left")
    for task in tasks:
        mark = "✓" if task.name in done else "·"
        stars = "●" * task.difficulty + "○" * (5 - task.difficulty)
        result.add_row(mark, task.unit, task.name, str(task.minutes), stars, done.get(task.name, ""))
    return result

"""Your answers: `check` says what is not right yet, `solution` shows a model answer, `progress` what you have done."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

from IPython.display import Markdown
from rich.table import Table

from course import predictions
from course.source import Source
from course.stops import STOPS
from course.tasks import CHECKLISTS, TASKS, Case, CheckResult, NotYet, Task, run
from course.tasks import progress as notes

SOLUTIONS = Path(__file__).resolve().parent.parent / "solutions"


def check(function: Callable, *what: str | Case) -> CheckResult:
    """Runs your answer on a task's cases, and says what is not right yet.

    Args:
        function: your answer. Its name says which task it is.
        what: the parts of the task to look at, or cases; all parts when left out.

    Returns:
        What was right, as text. At a writing stop of a lesson also what is not: the lesson goes on without it.

    Raises:
        NotYet: in an exercise, with the case, what was expected, and the likely bug by name.
        ValueError: no task, or no part of it, has this name.
    """
    name = getattr(function, "__name__", repr(function))
    task = TASKS.get(name) or STOPS.get(name)
    if task is None:
        raise ValueError(f"no task is called {name}: name your function after its task, one of {_names()}")
    cases = [case for part in what for case in ([part] if isinstance(part, Case) else task.cases(part))]
    try:
        result = run(task, function, cases or task.cases())
    except NotYet as complaint:
        if name in TASKS:
            raise
        return CheckResult(str(complaint))
    if not what:
        notes.note(name)
    return result


def solution(name: str, anyway: bool = False) -> Source | Markdown | CheckResult:
    """The model answer to a task, or to a question in words with a list of points to mark your own by.

    Args:
        name: of a writing stop, whose answer is closed until clicked; of an exercise, whose answer opens after a passed
            check; or of a question in words, as its cell has it.
        anyway: open it before.

    Raises:
        ValueError: nothing has this name; or `solutions/` is not here, as where an instructor hands out the exercises.
    """
    if name in STOPS:
        return _source_of(STOPS[name])
    if name not in TASKS and name not in CHECKLISTS:
        raise ValueError(f"no task is called {name}: one of {_names()}, {', '.join(CHECKLISTS)}")
    if not anyway and name not in notes.read():
        first = f"check({name}) passes" if name in TASKS else "you have written your own"
        return CheckResult(f"{name}: the model answer opens when {first}; before that with anyway=True")
    answer = _from_solutions(name)
    if name in TASKS:
        notes.note(f"read {name}")
        return Source(answer, f"A model answer to {name}")
    notes.note(name)
    points = "\n".join(f"- [ ] {point}" for point in CHECKLISTS[name])
    return Markdown(f"**A model answer.**\n\n{answer}\n\n**Mark your own.** Does it say this?\n\n{points}")


def progress() -> Table:
    """What you have done, as a table: exercises, questions in words, and each lesson's stops and predictions."""
    done, tasks = notes.read(), list(TASKS.values())
    right = sum(task.name in done for task in tasks)
    asked = predictions.names()
    guessed = [name for name in asked if f"predict {name}" in done]
    hits = sum(done[f"predict {name}"] == "right" for name in guessed)
    stops = sum(name in done for name in STOPS)
    guesses = f"{len(guessed)} of {len(asked)} predictions, {hits} right"
    table = Table(title=f"{right} of {len(tasks)} exercises done, {stops} of {len(STOPS)} writing stops, {guesses}")
    for column in ("", "unit", "task", "minutes", "difficulty", "done"):
        table.add_column(column, justify="right" if column == "minutes" else "left")
    for task in tasks:
        stars = "●" * task.difficulty + "○" * (5 - task.difficulty)
        seen = ", model answer opened" if f"read {task.name}" in done else ""
        day = done.get(task.name, "")
        table.add_row("✓" if day else "·", task.unit, task.name, f"{task.minutes}", stars, (day + seen).lstrip(", "))
    for name in CHECKLISTS:
        day = done.get(name, "")
        table.add_row("✓" if day else "·", "in words", name, "", "", f"{day}, marked by yourself" if day else "")
    table.add_section()
    for unit in dict.fromkeys(task.unit for task in STOPS.values()):
        own = [task.name for task in STOPS.values() if task.unit == unit]
        here = [name for name in asked if name.startswith(unit[:2])]
        written, made = sum(name in done for name in own), len(set(here) & set(guessed))
        whole = written == len(own) and made == len(here)
        words = f"{written} of {len(own)} stops, {made} of {len(here)} predictions"
        table.add_row("✓" if whole else "·", unit, "in the lesson", "", "", words)
    return table


def _names() -> str:
    return ", ".join([*TASKS, *STOPS])


def _source_of(stop: Task) -> Source:
    assert stop.model_answer is not None, f"{stop.name} has no model answer"
    return Source(inspect.getsource(stop.model_answer), f"One way to write {stop.name}", folded=True)


def _from_solutions(name: str) -> str:
    """The text of the cell with this id, the marks of the solution left out."""
    for path in sorted(SOLUTIONS.glob("*/*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"solutions/{path.parent.name}/{path.name} is no notebook: {error!r}") from None
        for cell in cells:
            if cell["metadata"].get("nbgrader", {}).get("grade_id") == name:
                return re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", "".join(cell["source"]), flags=re.MULTILINE)
    raise ValueError(f"{name}: there is no model answer here, for the folder solutions/ has none: ask your instructor")

"""The suites of `make bench-gpu`: every module in this folder is one.

A suite has a docstring, whose first line is its title in the table, and

    why_not(machine) -> str              why it cannot run on this machine; "" where it can
    checks(machine) -> Iterable          the cases to check, the most important ones first; str() names a case
    subject(case) -> str                 what a failing check costs: this is not timed. "": the whole suite
    check(machine, case) -> int          compares with float64 under the error budget; returns the number of
                                         comparisons, raises AssertionError for a wrong result
    timings(machine) -> Iterable         the cases to time, the most important ones first
    time(machine, case) -> Iterator      yields rows of figures, plain numbers and strings; nothing of
                                         `machine.failed` is timed
    TOGETHER                             so many consecutive checks share a compilation; 1 where it is left out

`benchmarks.machine.Machine` has the device, `attempt` for what may fail, and the timing of functions in turns.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> list[str]:
    """The names of all suites."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """Imports a suite by its name."""
    return importlib.import_module(f"{__name__}.{name}")

"""The suites of `make bench-gpu`: every module in this folder is one.

A suite has a docstring, whose first line is its title in the table, and two functions:

    check(machine) -> int               compares the cases from `machine.share` with float64 under the error budget;
                                        returns their number, raises AssertionError for a wrong result
    measure(machine) -> Iterator[dict]  yields a row of figures per case, plain numbers and strings

`benchmarks.machine.Machine` has the device, the time limit and the timing of functions in turns.
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

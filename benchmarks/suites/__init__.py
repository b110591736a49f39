"""The suites of `make bench-gpu`: every module in this folder is one.

A suite has a docstring, whose first line is its title in the table, and two functions:

    check(machine) -> int               compares the cases that `machine.share` hands out with float64 under the error
                                        budget; how many; raises where wrong
    measure(machine) -> Iterator[dict]  yields one row of figures a case, plain numbers and strings

`benchmarks.machine.Machine` says where it runs, how large cases shall be, and times functions against each other.
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

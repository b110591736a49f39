"""Plants a fault in a rung: the rung's own source with a few lines changed, imported as a module of its own."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

from kernels.hopper.launch import RUNGS

_numbers = itertools.count()


def plant(rung: str, folder: Path, *edits: tuple[str, str]) -> ModuleType:
    """A rung with each `old` replaced by `new`. Each old text must be there, once, or twice with the same meaning."""
    source = Path(str(RUNGS[rung].__file__)).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in source, f"{rung} has no {old!r}: the fault cannot be planted"
        source = source.replace(old, new, 1)
    path = folder / f"planted_{next(_numbers)}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""docs/emulator.md is run: its kernel gives the report that it shows, and is right with the fence."""

import importlib.util
import re
import traceback
from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from kernels import emulator
from kernels.emulator import MissingFence

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "emulator.md"
TEXT = DOCS.read_text(encoding="utf-8")
CODE = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
REPORT = re.search(r"```\n(MissingFence.*?)```", TEXT, re.DOTALL).group(1)


def run(code: str, folder: Path):
    path = folder / "double.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("double", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kernel_in_the_docs_gives_the_report_in_the_docs(tmp_path):
    with pytest.raises(MissingFence) as caught:
        run(CODE, tmp_path)
    last = "".join(traceback.format_exception_only(caught.value))
    assert last == "kernels.emulator.reports." + REPORT


def test_with_the_fence_that_the_report_asks_for_the_kernel_is_right(tmp_path):
    store = "* 2)\n"
    assert CODE.count(store) == 1
    module = run(CODE.replace(store, f"{store}    fence_async_shared()\n"), tmp_path)
    assert torch.equal(module.out, 2 * module.x)


def test_every_report_and_every_file_is_in_the_docs():
    reports = {name for name in emulator.__all__ if name not in ("Report", "Run", "emulate")}
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == reports
    files = {path.name for path in Path(emulator.__file__).parent.glob("*.py")}
    assert set(re.findall(r"^\| \[`(\w+\.py)`\]", TEXT, re.MULTILINE)) == files - {
        "__init__.py",
        "__main__.py",
        "example.py",
    }


def test_a_notebook_cell_will_do():
    cell = InteractiveShell.instance().run_cell(CODE, silent=True)
    assert isinstance(cell.error_in_exec, MissingFence)
    assert "tile.store(tile.load(" in str(cell.error_in_exec)

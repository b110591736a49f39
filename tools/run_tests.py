"""`make test`: lint, format, types, tests, notebooks and browser. All parts run; if one fails, `make test` fails."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
CELL_TIMEOUT = 120  # seconds; a whole notebook should take under 60


@dataclass
class Tally:
    """How many checks of a part passed, failed and were skipped."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)


def main() -> None:
    parts: dict[str, Callable[[], Tally]] = {
        "ruff check": lambda: tool("ruff", "check", "."),
        "ruff format": lambda: tool("ruff", "format", "--check", "."),
        "types": lambda: tool("mypy"),
        "tests": lambda: pytest("tests", "--ignore=tests/browser", "-n", str(os.cpu_count()), "--dist", "worksteal"),
        "notebooks": run_notebooks,
        "browser": lambda: pytest("tests/browser", "-n", "2", "--dist", "worksteal"),  # each with its JupyterLab
    }
    total, lines, not_run, start = Tally(), [], [], time.time()
    for name, run in parts.items():
        print(f"\n—— {name} ——", flush=True)
        part_start = time.time()
        tally = run()
        total += tally
        verdict = "FAILED" if tally.failed else "ok" if tally.passed else "not run"
        lines.append(f"{name:<12} {verdict:<7} {tally.passed:>4} passed  {time.time() - part_start:>4.0f} s")
        if verdict == "not run":
            not_run.append(f"{name} tests not run: why stands above")
    print("\n" + "\n".join(lines))
    print(f"{'in all':<12} {'FAILED' if total.failed else 'ok':<7} {'':>11}  {time.time() - start:>4.0f} s")
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", *not_run, sep="\n")
    sys.exit(total.failed > 0)


def tool(*command: str) -> Tally:
    """A command line tool of `.venv`, counted as one check."""
    return Tally(failed=1) if python_module(*command) else Tally(passed=1)


def pytest(*arguments: str) -> Tally:
    """Runs pytest, counted test by test. A run without a test is a failure: a check must be able to fail."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.xml")
        status = python_module("pytest", *arguments, f"--junitxml={counts}")
        tally = read_junit(counts) if counts.exists() else Tally()
    return tally + Tally(failed=1) if status and not tally.failed else tally


def read_junit(path: Path) -> Tally:
    """The counts in the JUnit file that pytest wrote."""
    tally = Tally()
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        tally += Tally(tests - failed - skipped, failed, skipped)
    return tally


def run_notebooks() -> Tally:
    """Runs each notebook in a kernel of its own, and compares its outputs with the stored ones."""
    found = notebooks()
    if not found:
        print("There is no notebook in notebooks/: the lessons are missing.")
        return Tally(failed=1)
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
    options += ["--nbval-cell-timeout", str(CELL_TIMEOUT), "-n", str(os.cpu_count()), "--dist", "loadfile"]
    return pytest(*options, *map(str, found))


def notebooks(root: Path = ROOT, folders: Iterable[str] = ("notebooks", "solutions")) -> list[Path]:
    """The notebooks in these folders: if left out, those stored with outputs, the lessons and the solutions."""
    found = [path for folder in folders for path in sorted((root / folder).rglob("*.ipynb"))]
    return [path.relative_to(root) for path in found if ".ipynb_checkpoints" not in path.parts]


def python_module(*command: str) -> int:
    """Runs `python -m …` from the root, without network or progress of one's own; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        # The course runs without a network, so its tests do too; and a test ticks off none of your exercises.
        own = {"HF_HUB_OFFLINE": "1", "MINILLM_PROGRESS": str(Path(folder, "progress.json"))}
        own["PYTHONDONTWRITEBYTECODE"] = ""  # dozens of processes start, and each would compile torch anew
        own["OMP_NUM_THREADS"] = "1"  # one process per core: more threads would only compete for them
        return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=os.environ | own).returncode


if __name__ == "__main__":
    main()

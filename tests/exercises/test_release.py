"""`exercises/` is what `make exercises` makes of `solutions/`, and nothing in it gives an answer away."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course.tasks import TASKS
from grading import ROOT
from grading.release import RELEASE, SOURCE, notebooks, release

UNITS = [path.stem for path in notebooks(ROOT / SOURCE)]
EVERY = pytest.mark.parametrize("unit", UNITS)
TAG = {"tags": ["raises-exception"]}


def stored(folder, unit):
    return ROOT / folder / unit / f"{unit}.ipynb"


def released(unit):
    return nbformat.read(stored(RELEASE, unit), as_version=4)


def test_there_is_a_unit_for_each_task_and_an_exercise_for_each_unit():
    assert set(UNITS) == {task.unit for task in TASKS.values()}
    assert [path.stem for path in notebooks(ROOT / RELEASE)] == UNITS


@EVERY
def test_what_is_stored_is_what_is_made_today(unit, tmp_path):
    nbformat.write(release(nbformat.read(stored(SOURCE, unit), as_version=4)), tmp_path / "made.ipynb")
    assert (tmp_path / "made.ipynb").read_bytes() == stored(RELEASE, unit).read_bytes(), "stale: run `make exercises`"


@EVERY
def test_solutions_hidden_tests_and_outputs_are_not_handed_out(unit):
    text = stored(RELEASE, unit).read_text(encoding="utf-8")
    assert "HIDDEN" not in text and "SOLUTION" not in text
    code = "\n".join(cell.source for cell in released(unit).cells if cell.cell_type == "code")  # hints may say more
    for cell in nbformat.read(stored(SOURCE, unit), as_version=4).cells:
        for kind in ("SOLUTION", "HIDDEN TESTS"):
            for secret in re.findall(f"### BEGIN {kind}\n(.*?)### END {kind}", cell.source, flags=re.S):
                for line in filter(lambda line: len(line) > 20, map(str.strip, secret.splitlines())):
                    assert line not in code
        if cell.cell_type == "markdown" and cell.metadata.get("nbgrader", {}).get("solution"):
            assert cell.source[:60] not in text
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in released(unit).cells)


@EVERY
def test_a_check_that_says_not_yet_does_not_stop_run_all(unit):
    checks = [cell for cell in released(unit).cells if cell.source.startswith("check(")]
    assert checks and all(cell.metadata.tags == TAG["tags"] for cell in checks)


@EVERY
def test_answers_are_open_and_tests_are_locked(unit):
    for cell in released(unit).cells:
        own = cell.metadata.get("nbgrader", {})
        if own.get("solution") and cell.cell_type == "code":
            assert cell.metadata.get("editable", True) and "raise NotImplementedError()" in cell.source
        elif own.get("grade") and cell.cell_type == "code":
            assert cell.metadata.editable is False and cell.metadata.deletable is False


def test_nbgrader_itself_makes_the_same_but_for_our_tag(tmp_path):
    pytest.importorskip("nbgrader", reason="not verified: that nbgrader's own command makes the same release")
    unit = UNITS[0]
    source = tmp_path / "source" / unit
    source.mkdir(parents=True)
    shutil.copy(stored(SOURCE, unit), source)
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", "--force", "--no-db", unit]
    own = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    theirs = nbformat.read(tmp_path / "release" / unit / f"{unit}.ipynb", as_version=4)
    ours = released(unit)
    for cell in ours.cells:
        if cell.metadata.get("tags") == TAG["tags"]:
            del cell.metadata["tags"]
    assert nbformat.writes(ours) == nbformat.writes(theirs)

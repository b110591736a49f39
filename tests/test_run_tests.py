"""`make test` itself can fail."""

import shutil
from functools import partial

import pytest

from tools import run_tests
from tools.run_tests import Tally
from tools.run_tests import pytest as run_pytest


def test_passed_failed_and_skipped_are_counted(tmp_path, capfd):
    path = tmp_path / "test_planted.py"
    path.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n")
    assert run_pytest(str(path)) == Tally(passed=1, failed=1, skipped=1)


def test_a_run_without_a_test_fails(tmp_path, capfd):
    assert run_pytest(str(tmp_path)) == Tally(failed=1)


def test_a_course_without_notebooks_fails(monkeypatch, capsys):
    monkeypatch.setattr(run_tests, "notebooks", list)
    assert run_tests.run_notebooks() == Tally(failed=1)
    assert "no notebook" in capsys.readouterr().out


def test_one_failed_part_fails_the_whole_and_the_others_still_run(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(run_tests, "tool", lambda *command: ran.append(command[0]) or Tally(failed=1))
    monkeypatch.setattr(run_tests, "pytest", lambda *arguments: ran.append("pytest") or Tally(passed=2))
    monkeypatch.setattr(run_tests, "run_notebooks", lambda: Tally(passed=3, skipped=1))
    with pytest.raises(SystemExit) as stop:
        run_tests.main()
    assert stop.value.code
    assert ran == ["ruff", "ruff", "mypy", "pytest", "pytest"]
    assert capsys.readouterr().out.splitlines()[-1] == "7 passed, 3 failed, 1 skipped"


def test_a_part_of_which_all_is_skipped_is_said_not_to_have_run_and_does_not_count_as_passed(monkeypatch, capsys):
    browser = Tally(skipped=4)
    monkeypatch.setattr(run_tests, "tool", lambda *command: Tally(passed=1))
    monkeypatch.setattr(run_tests, "pytest", lambda *args: browser if args[0] == "tests/browser" else Tally(passed=2))
    monkeypatch.setattr(run_tests, "run_notebooks", lambda: Tally(passed=3))
    with pytest.raises(SystemExit) as stop:
        run_tests.main()
    assert not stop.value.code
    *_, summary, note = capsys.readouterr().out.splitlines()
    assert summary == "8 passed, 0 failed, 4 skipped" and note.startswith("browser tests not run")


PLANTED = """{"cells": [{"cell_type": "code", "id": "one", "metadata": {}, "source": ["print(6 * 7)"],
"execution_count": 1, "outputs": [{"output_type": "stream", "name": "stdout", "text": ["%s\\n"]}]}],
"metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
"nbformat": 4, "nbformat_minor": 5}"""


def test_a_notebook_that_prints_something_else_than_is_stored_fails(tmp_path, monkeypatch, capfd):
    for name, text in {"notebooks/true": PLANTED % "42", "solutions/false": PLANTED % "43"}.items():
        path = tmp_path / f"{name}.ipynb"
        path.parent.mkdir()
        path.write_text(text)
    sanitize = tmp_path / "tests" / "nbval_sanitize.cfg"
    sanitize.parent.mkdir()
    shutil.copy(run_tests.ROOT / "tests" / sanitize.name, sanitize)
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests, "notebooks", partial(run_tests.notebooks, tmp_path))
    assert run_tests.run_notebooks() == Tally(passed=1, failed=1)

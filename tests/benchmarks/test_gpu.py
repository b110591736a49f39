"""make bench-gpu without a GPU: every suite is walked through in the interpreter, and a failure stops nobody else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, lessons, suites
from benchmarks.machine import Machine, commit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A dry run without Jupyter's packages, as on a GPU machine that has torch and triton only."""
    folder = tmp_path_factory.mktemp("results")
    blocked = folder / "blocked"
    for name in ("IPython", "ipywidgets", "matplotlib", "jupyter_core", "allpairspy"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not on this machine')")
    path = os.pathsep.join([str(blocked), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    return run, folder


def test_the_dry_run_walks_through_every_suite(dry_run):
    run, folder = dry_run
    assert run.returncode == 0, run.stderr[-2000:]
    assert {path.stem for path in folder.glob("*.json")} == set(suites.names())
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["checked"] > 0 and result["rows"] and not result["failure"]


def test_a_result_says_where_and_when_it_was_measured(dry_run):
    result = json.loads((dry_run[1] / "flash_attention.json").read_text())
    assert {"device", "driver", "torch", "triton", "python", "date", "commit"} <= result["machine"].keys()
    assert result["machine"]["dry_run"] is True
    row = result["rows"][0]
    assert row["direction"] == "forward" and {"median", "low", "high", "rounds"} == row["milliseconds"]["ours"].keys()


def test_the_table_comes_last_and_a_dry_run_says_that_it_measured_nothing(dry_run):
    lines = dry_run[0].stdout.splitlines()
    assert "no figure above means anything" in lines[-1]
    assert any(line.startswith("flash_attention: FlashAttention-2 in Triton") for line in lines)


@pytest.mark.parametrize("where", ["check", "measure"])
def test_a_failing_suite_is_reported_and_the_next_one_runs(where, monkeypatch, tmp_path, capsys):
    def fail(machine):
        raise AssertionError("planted")

    good = SimpleNamespace(__doc__="Good.", check=lambda machine: 1, measure=lambda machine: iter([{"speed": 2.0}]))
    bad = SimpleNamespace(**(vars(good) | {"__doc__": "Bad.", where: fail}))
    monkeypatch.setattr(suites, "names", lambda: ["bad", "good"])
    monkeypatch.setattr(suites, "load", {"bad": bad, "good": good}.__getitem__)
    monkeypatch.setattr(lessons, "notebooks_with_gpu_cells", lambda: [])
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    table = capsys.readouterr().out.split("Bad.")[-1]
    assert stop.value.code == 1
    assert f"FAILED in {where}: AssertionError: planted" in table and "speed=2" in table
    assert json.loads((tmp_path / "good.json").read_text())["rows"] == [{"speed": 2.0}]
    assert json.loads((tmp_path / "bad.json").read_text())["rows"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what is said without one was not checked")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="(?s)needs a CUDA device of sm_80 or newer.*torch sees no CUDA device"):
        gpu.main()


def test_functions_are_timed_in_turns():
    calls = []
    timings = Machine(dry_run=True).time({name: lambda name=name: calls.append(name) for name in "ab"})
    assert calls == list("abab" + "ab")  # once to warm up, once to guess the rounds, one round
    assert timings.keys() == {"a", "b"} and timings["a"].rounds == 1


def test_the_time_that_suites_may_take_runs_out():
    assert not Machine(dry_run=True, seconds=60).out_of_time()
    assert Machine(dry_run=True, seconds=-1).out_of_time()


def test_no_suite_takes_the_time_of_the_next_one():
    machine = Machine(dry_run=True, seconds=60)
    machine.share_time(suites=3)
    assert 15 < machine.deadline - time.monotonic() <= 20


@pytest.mark.parametrize("path", lessons.notebooks_with_gpu_cells(), ids=lambda path: path.stem)
def test_gpu_cells_import_every_name_that_they_use(path):
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    program = "\n".join(lessons.gpu_cells(path))
    found = subprocess.run(ruff, input=program, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_gpu_cells_run_in_order_in_one_namespace(tmp_path):
    cells = [
        {"cell_type": "code", "metadata": {"tags": ["gpu"]}, "source": ["x = 1\n", "y = 2"]},
        {"cell_type": "code", "metadata": {}, "source": ["raise SystemExit('no GPU cell')"]},
        {"cell_type": "code", "metadata": {"tags": ["gpu"]}, "source": ["assert x + y == 3"]},
    ]
    path = tmp_path / "99_lesson.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert len(lessons.gpu_cells(path)) == 2
    lessons.run(path)


def test_the_commit_is_a_hash_or_unknown():
    assert commit() == "unknown" or len(commit().removesuffix("+changes")) == 40

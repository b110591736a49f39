"""make bench-gpu without a GPU: every suite runs in the interpreter, and a failure stops no other suite."""

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu, lessons, suites
from benchmarks.children import Child, ChildRun, run_children
from benchmarks.machine import Machine, commit
from benchmarks.timing import Timing
from kernels.targets import TARGETS
from kernels.tuning import KERNELS, candidates
from tests.benchmarks.copies import ROOT, bench_gpu

# torch and triton with what they need themselves, numpy, and this repository: all that a GPU machine has.
THERE = {
    *("torch", "torchgen", "functorch", "triton", "numpy", "nvidia", "cuda"),
    *("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions", "setuptools"),
    *("benchmarks", "kernels", "minillm"),
}
BARE_MACHINE = f"""
import sys
from importlib.machinery import PathFinder

class OnlyWhatIsThere(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        there = name in {THERE} or name in sys.stdlib_module_names or name.startswith("_")
        if path is None and not there:
            return None
        return super().find_spec(name, path, target)

sys.meta_path = [OnlyWhatIsThere if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    bare = folder / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE_MACHINE)  # Python imports it when it starts, the children's too
    return bench_gpu("--dry-run", "--out", folder, path=[bare, ROOT]), folder


def test_a_bare_machine_has_no_package_but_torch_triton_and_numpy(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE_MACHINE)
    for name, code in {"numpy": 0, "json": 0, "pytest": 1, "yaml": 1, "tokenizers": 1}.items():
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        run = subprocess.run([sys.executable, "-c", f"import {name}"], env=environment, capture_output=True)
        assert run.returncode == code, name


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
    assert row["direction"] == "forward" and row["milliseconds"]["ours"].keys() == Timing.__dataclass_fields__.keys()


def test_on_a_cpu_the_clock_and_the_power_of_the_gpu_are_said_to_be_absent(dry_run):
    result = json.loads((dry_run[1] / "flash_attention.json").read_text())
    for where in (result["machine"], *result["rows"]):
        assert where["gpu"]["not read"].startswith("no GPU")


OLD_INTERPRETER = """
from triton.runtime import interpreter

mended = interpreter._patch_lang_tensor

def refused(self):
    raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

def as_in_3_6(tensor, scope):
    mended(tensor, scope)
    scope.set_attr(tensor, "__index__", refused)

interpreter._patch_lang_tensor = as_in_3_6
"""


def test_where_tritons_interpreter_fails_with_numpy_the_dry_run_says_what_it_leaves_out(tmp_path):
    """Triton 3.6.0 with numpy 2.4, planted: it makes an int of an array with one element."""
    (tmp_path / "sitecustomize.py").write_text(OLD_INTERPRETER)
    soon = time.monotonic() + 100
    run = ChildRun("flash_attention", [("check", soon), ("time", soon)], str(tmp_path / "progress.json"))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.work", "--dry-run"]
    result = gpu.SuiteResult("flash_attention")
    result.add(*run_children([Child(run, command, environment)], lambda found: None))
    assert gpu.verdict(result).startswith("left out: Triton's interpreter does not run with triton")
    assert "only 0-dimensional arrays" in result.why_not and not result.rows and not result.failures


def test_the_table_comes_last_and_a_dry_run_says_that_it_measured_nothing(dry_run):
    lines = dry_run[0].stdout.splitlines()
    assert "no figure above means anything" in lines[-1] and "were not" in lines[-1]
    assert any(line.startswith("flash_attention: FlashAttention-2 in Triton") for line in lines)


def test_the_parts_of_the_checks_are_all_of_them_and_keep_together_what_is_compiled_once():
    cases = list(range(20))
    parts = [list(Machine(dry_run=True, part=(number, 3)).share(cases, together=4)) for number in range(3)]
    assert sorted(itertools.chain(*parts)) == cases
    assert parts[1] == [4, 5, 6, 7, 16, 17, 18, 19]


def test_every_tile_that_can_be_timed_is_checked():
    """And on a GPU the checks come before the time: what is tuned is right, and compiled."""
    suite = suites.load("flash_attention")
    checked = {suite.subject(case) for case in suite.checks(Machine(dry_run=False))}
    for target, headdim in itertools.product(TARGETS, (64, 128, 256)):
        found = max(len(candidates(kernel, headdim, torch.bfloat16, target)) for kernel in KERNELS)
        assert {suite.candidate(headdim, causal, i) for causal in (False, True) for i in range(found)} <= checked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: what is said without one was not checked")
def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="(?s)needs a CUDA device of sm_80 or newer.*torch sees no CUDA device"):
        gpu.main()


def test_functions_are_timed_in_turns():
    calls = []
    timings = Machine(dry_run=True).time({name: lambda name=name: calls.append(name) for name in "ab"})
    assert calls == list("ab" + "ab")  # once to warm up, one round
    assert timings.keys() == {"a", "b"} and timings["a"].rounds == 1


def test_the_time_that_suites_may_take_runs_out():
    assert not Machine(dry_run=True, until=time.monotonic() + 60).out_of_time()
    assert Machine(dry_run=True, until=time.monotonic() - 1).out_of_time()


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

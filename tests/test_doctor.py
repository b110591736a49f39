"""The doctor's table: true here, and true on machines that are not here."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from course import doctor
from kernels import runtime
from kernels.runtime import SelfTest, TritonMode, self_test, triton_mode

NO_GPU = TritonMode("interpreter", "no CUDA device")


@pytest.fixture(scope="module")
def found():
    return {row.name: row for row in doctor.rows()}


def test_every_question_has_a_row(found):
    asked = {"machine", "Python", "torch", "CUDA device", "Triton", "flash-attn", "FlashAttention-3", "Redis"}
    assert asked | {"package `kernels`"} <= set(found)


def test_every_lesson_runs_and_those_without_kernels_run_live(found):
    lessons = {name.split()[1]: row.found for name, row in found.items() if name.startswith("lesson")}
    assert len(lessons) == len(doctor.lesson_notebooks())
    assert set(lessons.values()) <= {"live", "emulated"}
    assert {lessons[number] for number, need in doctor.LESSON_NEEDS.items() if need == "cpu"} == {"live"}


def test_the_kernels_that_an_import_finds_are_ours(found):
    assert found["package `kernels`"].verdict == "yes"
    assert found["package `kernels`"].found.startswith("the course's")


def test_the_table_shows_every_row(found):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(doctor.table(list(found.values())))
    text = console.export_text()
    assert all(name in text for name in found)


@pytest.mark.skipif(triton_mode().name == "none", reason="no Triton here: its interpreter was not tried")
def test_the_interpreter_is_right_in_fp32_and_fp16_and_its_wrong_bf16_is_named(found):
    row = found["Triton's interpreter"]
    assert row.found.startswith("right in fp32, fp16; WRONG in bf16"), "no trap any more? Then lesson and doctor change"
    assert row.verdict == "partly" and "fp32 first" in row.meaning


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels did not run on a GPU")
def test_a_gpu_is_right_in_every_precision():
    assert self_test("gpu").right == ["fp32", "fp16", "bf16"]


def test_a_self_test_that_does_not_run_says_why(monkeypatch):
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback …\nTypeError: only 0-dimensional arrays")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: broken)
    test = self_test("interpreter")
    assert test.summary() == "does not run: TypeError: only 0-dimensional arrays"
    assert doctor.test_row("Triton's interpreter", test, "").verdict == "no"


def test_a_self_test_runs_in_a_child_with_its_own_mode(monkeypatch):
    seen = []
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps({"fp32": 0.5}), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: seen.append((command, options["env"])) or answer)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    self_test("gpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    self_test("interpreter")
    assert [(command[-1], env.get("TRITON_INTERPRET")) for command, env in seen] == [("cuda", None), ("cpu", "1")]


def test_nan_is_wrong():
    assert SelfTest({"bf16": float("nan")}).wrong == ["bf16"]


@pytest.fixture
def pretend_gpu(monkeypatch):
    def pretend(major, minor):
        properties = SimpleNamespace(name="GPU", major=major, minor=minor, total_memory=80 * 2**30)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: SimpleNamespace())

    return pretend


@pytest.mark.parametrize(("capability", "mode"), [((7, 5), "interpreter"), ((8, 0), "gpu"), ((9, 0), "gpu")])
def test_the_gpus_capability_decides_not_its_name(pretend_gpu, capability, mode):
    pretend_gpu(*capability)
    assert triton_mode().name == mode
    assert doctor.cuda().verdict == ("yes" if mode == "gpu" else "partly")


def test_the_environment_variable_wins_over_a_gpu(pretend_gpu, monkeypatch):
    pretend_gpu(9, 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_mode() == TritonMode("interpreter", "TRITON_INTERPRET=1 is set")


def test_without_triton_the_table_says_so_and_nothing_fails(monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    mode = triton_mode()
    assert mode.name == "none"
    assert [row.verdict for row in doctor.triton(mode)] == ["no"]


@pytest.mark.parametrize(
    ("need", "mode", "capability", "how"),
    [
        ("cpu", "none", None, "live"),
        ("triton", "none", None, "with stored results"),
        ("triton", "interpreter", None, "emulated"),
        ("triton", "gpu", (8, 0), "live"),
        ("hopper", "interpreter", None, "emulated"),
        ("hopper", "gpu", (8, 9), "emulated"),
        ("hopper", "gpu", (9, 0), "live"),
        ("hopper", "gpu", (10, 0), "emulated"),
    ],
)
def test_a_lesson_runs_live_where_what_it_needs_is_there(monkeypatch, need, mode, capability, how):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert doctor.lesson_mode(need, TritonMode(mode, "")) == how


def test_a_flash_attn_built_for_another_torch_is_reported_not_raised(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert doctor.flash_attn().found == "does not import: ImportError"


def test_redis_without_a_server_is_an_answer_not_an_error(monkeypatch):
    pytest.importorskip("redis", reason="no Redis client: its row was not tried")
    monkeypatch.setattr(doctor, "REDIS_PORT", 1)
    assert "no server" in doctor.redis().found


def test_another_package_called_kernels_is_named(monkeypatch, tmp_path):
    other = SimpleNamespace(__version__="0.18.3", __file__=str(tmp_path / "kernels" / "__init__.py"))
    monkeypatch.setitem(sys.modules, "kernels", other)
    row = doctor.kernels_package()
    assert row.verdict == "no" and row.found == "another one, 0.18.3"

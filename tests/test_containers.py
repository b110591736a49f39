"""The Dockerfile and the dev container are right in form. Nothing here builds them."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tools.setup_venv import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def read_instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, each on one line, without comments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


INSTRUCTIONS = read_instructions()
RUNS = [argument for name, argument in INSTRUCTIONS if name == "RUN"]


def arguments(name):
    return [argument for instruction, argument in INSTRUCTIONS if instruction == name]


def test_the_base_is_an_argument_and_a_slim_python_that_the_course_supports():
    assert INSTRUCTIONS[0][0] == "ARG" and arguments("FROM")[0].startswith("${BASE} ")
    (version,) = re.findall(r"^BASE=python:(3\.\d+)-slim$", INSTRUCTIONS[0][1])
    assert version in SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])


def test_nothing_of_the_course_is_installed_or_run_as_root():
    names = [name for name, _ in INSTRUCTIONS]
    (user,) = arguments("USER")
    assert user == "learner" and any(f" {user} " in f"{run} " for run in RUNS if run.startswith("useradd"))
    assert names.index("USER") < names.index("COPY") < names.index("CMD")


def test_jupyter_keeps_to_loopback_and_its_token_unless_told_otherwise():
    (command,) = map(json.loads, arguments("CMD"))
    assert command[:2] == ["make", "lab"]
    instructions = "\n".join(argument for _, argument in INSTRUCTIONS)
    assert not re.search(r"--ip|token|password|allow[-_]root", instructions, re.IGNORECASE)


def test_a_port_is_published_on_loopback_only():
    published = re.findall(r"-p (\S+)", DOCKERFILE + (ROOT / "docs" / "gpu-sessions.md").read_text())
    assert published and all(address.startswith("127.0.0.1:") for address in published)


def test_pip_installs_the_same_as_make_and_with_constraints():
    installs = [run for run in RUNS if "pip install" in run]
    assert installs and all("--constraint .venv/constraints.txt" in run and f".[{EXTRAS}]" in run for run in installs)


@pytest.mark.parametrize(
    ("base", "torch"),
    [
        ([], ["torch==2.13.0"]),
        (["torch==2.12.0+cu126", "torchvision==0.27.0", "triton==3.7.0"], ["torch==2.12.0+cu126"]),
    ],
    ids=["slim Python", "CUDA image"],
)
def test_a_base_keeps_its_torch(tmp_path, base, torch):
    """Runs the step that writes the constraints, with a python3 whose pip lists what the base would have."""
    pins = ["numpy==2.4.6", "torch==2.13.0", 'triton==3.7.1; platform_system == "Linux"', "tornado==6.6.1"]
    (tmp_path / "constraints.txt").write_text("\n".join(pins) + "\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / "python3").write_text(f"#!/bin/sh\nprintf '%s\\n' pip==26.0 {shlex.join(base)}\n")
    (tmp_path / "python3").chmod(0o755)
    (step,) = [run for run in RUNS if "pip list" in run]
    subprocess.run(["sh", "-euc", f'PATH="$PWD:$PATH"; {step}'], cwd=tmp_path, check=True)
    written = (tmp_path / ".venv" / "constraints.txt").read_text().splitlines()
    assert [line for line in written if line.startswith("torch==")] == torch
    assert len([line for line in written if line.startswith("triton==")]) == 1
    assert {"numpy==2.4.6", "tornado==6.6.1"} < set(written) and len(written) == len(pins)


def test_every_step_is_a_shell_command():
    for run in RUNS:
        subprocess.run(["sh", "-nc", run], check=True)


def test_what_a_machine_made_stays_out_of_the_image():
    assert {".git", ".venv", "runs"} <= set(IGNORED)


def test_the_dev_container_takes_the_machine_and_its_user_and_wants_no_gpu():
    text = re.sub(r"^\s*//.*$", "", (ROOT / ".devcontainer" / "devcontainer.json").read_text(), flags=re.MULTILINE)
    container = json.loads(text)
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert any(stage.endswith(f" AS {container['build']['target']}") for stage in arguments("FROM"))
    assert container["remoteUser"] == arguments("USER")[0]
    assert container["hostRequirements"]["gpu"] == "optional"
    assert container["postCreateCommand"] == "make setup"

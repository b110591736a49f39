"""The workflow runs what a contributor runs, and .ci/run installs what pip cannot, with and without root."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
(JOB,) = WORKFLOW["jobs"].values()


def test_the_workflow_ends_with_what_ci_runs_and_stops_where_that_fails():
    assert JOB["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert not any("continue-on-error" in step for step in JOB["steps"])
    assert WORKFLOW[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads `on` as true


def test_the_workflow_takes_the_oldest_and_the_newest_python():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest, beyond = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", wanted).groups())
    assert JOB["strategy"]["matrix"]["python"] == [f"3.{oldest}", f"3.{beyond - 1}"]


INSTALL = ["apt-get update -qq", "apt-get install -y -qq chromium bubblewrap"]


@pytest.mark.parametrize(
    ("user", "sudo", "calls"),
    [
        (0, False, [*INSTALL, "make test"]),
        (1000, True, ["sudo -n apt-get update -qq", INSTALL[0], "sudo -n env", INSTALL[1], "make test"]),
        (1000, False, ["make test"]),
    ],
    ids=["root", "a user with sudo", "a user without"],
)
def test_ci_installs_browser_and_sandbox_where_it_may(tmp_path, user, sudo, calls):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    log = tmp_path / "log"
    programs = {"id": f"echo {user}", "apt-get": "", "make": ""} | ({"sudo": 'shift; exec "$@"'} if sudo else {})
    for name, body in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        noted = "" if name == "id" else f'echo "{name} $*" >> {log}\n'
        program.write_text(f"#!/bin/bash\n{noted}{body}\n")
        program.chmod(0o755)
    for name in ("bash", "dirname", "env"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    run = subprocess.run(
        [shutil.which("bash"), ".ci/run"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == len(calls) and all(map(str.startswith, lines, calls)), lines
    assert ("Could not install chromium bubblewrap" in run.stderr) == (calls == ["make test"])

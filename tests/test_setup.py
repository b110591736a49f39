"""`make lab` on someone's machine: quick when nothing changed, and one clear line when it cannot go on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup_venv

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the project's files and no `.venv`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup_venv.py", tmp_path / "tools")
    for name, path in {"ROOT": "", "VENV": ".venv", "STAMP": ".venv/installed", "LOG": ".venv/install.log"}.items():
        monkeypatch.setattr(setup_venv, name, tmp_path / path)
    return tmp_path


@pytest.fixture
def steps(project, monkeypatch):
    """Which of the two slow steps were taken; they do nothing here."""
    taken = []

    def make_venv():
        taken.append("make_venv")
        setup_venv.python_in(setup_venv.VENV).parent.mkdir(parents=True, exist_ok=True)
        setup_venv.python_in(setup_venv.VENV).touch()

    monkeypatch.setattr(setup_venv, "make_venv", make_venv)
    monkeypatch.setattr(setup_venv, "install", lambda: taken.append("install"))
    return taken


def test_a_second_run_does_nothing(steps):
    setup_venv.set_up()
    setup_venv.set_up()
    assert steps == ["make_venv", "install"]


def test_changed_dependencies_are_installed_into_the_same_venv(project, steps):
    setup_venv.set_up()
    with open(project / "constraints.txt", "a") as file:
        file.write("# changed\n")
    setup_venv.set_up()
    assert steps == ["make_venv", "install", "install"]


@pytest.mark.parametrize("change", ["interpreter", "folder", "dangling"])
def test_another_interpreter_or_folder_starts_afresh(project, steps, monkeypatch, change):
    setup_venv.set_up()
    if change == "interpreter":
        monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    elif change == "folder":
        stamp = setup_venv.STAMP.read_text().replace(str(project), "elsewhere")
        setup_venv.STAMP.write_text(stamp)
    else:
        setup_venv.python_in(setup_venv.VENV).unlink()
    setup_venv.set_up()
    assert steps == ["make_venv", "install"] * 2


def test_an_interrupted_installation_starts_afresh(steps, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup_venv, "install", interrupted)
        with pytest.raises(SystemExit, match="Stopped"):
            setup_venv.main()
    setup_venv.main()
    assert steps == ["make_venv", "make_venv", "install"]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: Retrying (Retry(total=4)) after NewConnectionError\nERROR: No matching distribution", "network"),
        ("SSLError(SSLCertVerificationError(CERTIFICATE_VERIFY_FAILED))", "PIP_CERT"),
        ("PermissionError: [Errno 13] Permission denied", "cannot be written"),
        ("noise\nERROR: Cannot install a and b.\n", "The installation failed: ERROR: Cannot install a and b"),
    ],
)
def test_a_failure_is_told_in_one_line_with_its_cure(output, says):
    line = setup_venv.cure(output)
    assert says in line and "\n" not in line


def test_too_little_disk_is_said_before_anything_is_downloaded(project, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10**9))
    with pytest.raises(SystemExit, match="1.0 GB are free"):
        setup_venv.make_venv()


def test_a_python_without_venv_names_the_package_to_install(project, monkeypatch):
    monkeypatch.setattr(setup_venv.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        setup_venv.make_venv()


def make_setup(project, **environment):
    """Runs `make setup` in the folder; returns what it wrote, less make's own closing line."""
    if shutil.which("make") is None:
        pytest.skip("no make: the Makefile was not tried")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PIP_", "MFLAGS"))}
    run = subprocess.run(["make", "setup"], cwd=project, env=inherited | environment, capture_output=True, text=True)
    assert run.returncode
    assert "Traceback" not in run.stderr
    return [line for line in run.stderr.splitlines() if not line.startswith("make")]


@pytest.mark.parametrize("answer", ["exit 1", None], ids=["too old", "missing"])
def test_a_wrong_python_is_one_line_that_says_what_to_do(project, answer):
    python = project / "python3.9"
    if answer:
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
    (line,) = make_setup(project, PYTHON=str(python))
    assert "3.11, 3.12 or 3.13" in line and "make lab PYTHON=" in line


def test_without_a_network_there_is_one_line_that_says_so(project):
    """The real pip, against a port where nothing listens."""
    (line,) = make_setup(
        project, PYTHON=sys.executable, PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="1"
    )
    assert "package index does not answer" in line
    assert not (project / ".venv" / "installed").exists()

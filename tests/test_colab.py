"""The first cell of a notebook on Colab, against a published copy on this disk and a pip that only writes down."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from course import colab
from course.colab import FIRST_CELL, first_cell
from tools import badges
from tools.badges import IMAGE, make_badges, repository_address, stale_files

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "https://github.com/someone/minillm"
NOTEBOOKS = badges.notebooks(ROOT)

# Installs `minillm-probe` as pip would have, in the folder that it lies in, and writes down how it was called.
FAKE_PIP = """\
import pathlib, sys
here = pathlib.Path(__file__).parent.parent
with open(here / "calls.txt", "a") as calls:
    print(*sys.argv[1:], file=calls)
info = here / "minillm_probe-1.0.dist-info"
info.mkdir()
(info / "METADATA").write_text("Metadata-Version: 2.1\\nName: minillm-probe\\nVersion: 1.0\\n")
"""

# The torch of a runtime with a T4, as far as the doctor asks it.
FAKE_TORCH = """\
from types import SimpleNamespace
t4 = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 * 2**30)
cuda = SimpleNamespace(is_available=lambda: True, get_device_properties=lambda index: t4)
"""

# What a runtime of Colab is to the cell: a kernel that has google.colab loaded, in a folder without the course.
RUNTIME = """\
import importlib.util, os, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
for _ in range(int(sys.argv[2])):
    exec(compile(open(sys.argv[1]).read(), "first cell", "exec"), {})
for package in ("course", "kernels", "minillm"):
    print(importlib.util.find_spec(package).origin)
print(os.environ["PYTHONPATH"].split(os.pathsep)[0])
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A git repository with the code of today, whose lessons need one more package."""
    root = tmp_path_factory.mktemp("published")
    for package in ("course", "kernels", "minillm"):
        for path in (ROOT / package).rglob("*.py"):
            copy = root / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    pyproject = (ROOT / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(
        pyproject.replace("dependencies = [", 'dependencies = ["minillm-probe>=1", ', 1)
    )
    author = ["-c", "user.name=A Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*author, "commit", "--quiet", "--message", "Published"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture
def runtime(tmp_path):
    """Runs a cell some times over in a new process that takes itself for Colab's."""
    pip = tmp_path / "packages" / "pip"
    pip.mkdir(parents=True)
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text(FAKE_PIP)
    (tmp_path / "packages" / "torch.py").write_text(FAKE_TORCH)

    def run(source, times=1):
        (tmp_path / "cell.py").write_text(source)
        return subprocess.run(
            [sys.executable, "-c", RUNTIME, "cell.py", str(times)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "PIP_NO_INDEX": "1"},
            capture_output=True,
            text=True,
        )

    return run


def test_the_first_cell_sets_colab_up_once_and_again_after_a_restart(published, runtime, tmp_path):
    cell = first_cell(published.as_uri())
    twice = runtime(cell, times=2)
    assert twice.returncode == 0, twice.stderr
    printed = twice.stdout.splitlines()
    assert re.match(r"Python 3\.\d+\.\d+, torch \S+", printed[0])
    assert printed[1] == "CUDA device: Tesla T4, sm_75, 15 GiB; older than sm_80: PyTorch's attention only"
    assert printed[2:4] == printed[:2]
    clone = tmp_path / "minillm-course"
    packages = [str(clone / package / "__init__.py") for package in ("course", "kernels", "minillm")]
    assert printed[4:] == [*packages, str(clone)]  # and child processes find them too

    # The address is gone by now, and is not needed.
    restarted = runtime(first_cell("file:///nowhere"))
    assert restarted.returncode == 0, restarted.stderr
    assert restarted.stdout.splitlines() == printed[2:]
    assert (tmp_path / "packages" / "calls.txt").read_text() == "install --quiet --no-deps minillm-probe>=1\n"


def test_without_an_address_the_first_cell_says_in_one_line_what_to_do(runtime):
    run = runtime(FIRST_CELL)
    (line,) = run.stderr.splitlines()
    assert run.returncode and not run.stdout
    assert line.startswith("Set REPOSITORY to the course's address, and run again. fatal: ")


def test_in_a_local_installation_the_first_cell_does_nothing(monkeypatch, capfd, tmp_path):
    def forbidden(*command, **options):
        raise AssertionError(f"ran {command}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", forbidden)
    path, environment = list(sys.path), dict(os.environ)
    exec(first_cell(ADDRESS), {})
    assert (sys.path, dict(os.environ), list(tmp_path.iterdir())) == (path, environment, [])
    assert capfd.readouterr() == ("", "")


def test_a_machine_with_nothing_gets_everything_but_torch_triton_and_jupyterlab(monkeypatch):
    monkeypatch.setattr(colab, "is_installed", lambda distribution: False)
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [line for line in dependencies if not re.match(r"(torch|triton|jupyterlab)\b", line)]
    assert colab.missing_requirements(ROOT / "pyproject.toml") == wanted
    assert len(wanted) == len(dependencies) - 3


def test_an_old_version_is_left_as_it_is(tmp_path):
    """Colab's IPython is years older than ours, and its page needs that one."""
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["ipython>=999", "absent-package>=1"]\n')
    assert colab.missing_requirements(tmp_path / "pyproject.toml") == ["absent-package>=1"]


def test_the_set_up_imports_nothing_that_colab_could_lack():
    """It is imported before anything is installed."""
    top = re.findall(r"^(?:import|from) (\w+)", (ROOT / "course" / "colab.py").read_text(), re.MULTILINE)
    assert set(top) <= sys.stdlib_module_names | {"__future__"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_begins_with_the_first_cell_under_its_title(path):
    title, cell = json.loads(path.read_text())["cells"][:2]
    assert title["cell_type"] == "markdown" and "".join(title["source"]).startswith("# ")
    assert (cell["cell_type"], cell["id"]) == ("code", colab.FIRST_CELL_ID)
    assert cell["metadata"] == colab.FIRST_CELL_METADATA
    assert "".join(cell["source"]) == first_cell(repository_address(ROOT / "pyproject.toml"))
    assert cell["outputs"] == []


def test_the_repository_is_as_make_badges_leaves_it():
    assert stale_files(ROOT) == {}


@pytest.fixture
def project(tmp_path):
    """A small course: a lesson, a solution, a table and the project file without an address."""
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": ["# 00 · Title, 标题\n", "\n", "**Text.**"]}
    cell = {"cell_type": "code", "id": colab.FIRST_CELL_ID, "source": FIRST_CELL.splitlines(keepends=True)}
    for name in ("notebooks/00_start.ipynb", "solutions/one/task.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps({"cells": [title, cell]}, indent=1, ensure_ascii=False) + "\n")
    prose = "See [the start](notebooks/00_start.ipynb).\n"
    (tmp_path / "README.md").write_text(prose + "\n| 00 | [Start](notebooks/00_start.ipynb) | 20 |\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "course"\n')
    return tmp_path


def publish(project, address):
    (project / "pyproject.toml").write_text(f'[project]\nname = "course"\n[project.urls]\nRepository = "{address}"\n')


def texts(project):
    return {path: path.read_text() for path in project.rglob("*") if path.is_file()}


def cell_sources(project, name):
    return ["".join(cell["source"]) for cell in json.loads((project / name).read_text())["cells"]]


def test_without_an_address_make_badges_says_so_and_changes_nothing(project):
    before = texts(project)
    line = make_badges(project)
    assert "[project.urls]" in line and "\n" not in line
    assert texts(project) == before


def test_badges_lead_to_the_lesson_and_the_cell_learns_the_address(project):
    publish(project, ADDRESS)
    make_badges(project)
    opens = "https://colab.research.google.com/github/someone/minillm/blob/main/notebooks/00_start.ipynb"
    badge = f"[![Open in Colab]({IMAGE})]({opens})"
    title, cell = cell_sources(project, "notebooks/00_start.ipynb")
    assert title == f"# 00 · Title, 标题\n\n{badge}\n\n**Text.**"
    assert cell == first_cell(ADDRESS) and f'REPOSITORY = "{ADDRESS}"' in cell
    prose, _, row = (project / "README.md").read_text().splitlines()
    assert prose == "See [the start](notebooks/00_start.ipynb)."
    assert row == f"| 00 | [Start](notebooks/00_start.ipynb) {badge} | 20 |"


def test_a_solutions_badge_opens_the_exercise(project):
    publish(project, ADDRESS)
    make_badges(project)
    title, _ = cell_sources(project, "solutions/one/task.ipynb")
    assert "/blob/main/exercises/one/task.ipynb)" in title


@pytest.mark.parametrize("written", [ADDRESS, f"{ADDRESS}/", f"{ADDRESS}.git"])
def test_badges_twice_are_badges_once(project, written):
    publish(project, written)
    assert make_badges(project) == f"3 files changed for {ADDRESS}."
    once = texts(project)
    assert make_badges(project) == f"0 files changed for {ADDRESS}."
    assert texts(project) == once


def test_badges_follow_when_the_repository_moves(project):
    publish(project, "https://github.com/before/course")
    make_badges(project)
    publish(project, ADDRESS)
    make_badges(project)
    readme, (title, cell) = (project / "README.md").read_text(), cell_sources(project, "notebooks/00_start.ipynb")
    for text in (readme, title, cell):
        assert text.count("someone/minillm") == 1 and "before/course" not in text


def test_another_host_gets_the_address_and_no_badges(project):
    publish(project, "https://codeberg.org/someone/minillm")
    assert "no badges" in make_badges(project)
    title, cell = cell_sources(project, "notebooks/00_start.ipynb")
    assert "codeberg.org" in cell and IMAGE not in title
    assert IMAGE not in (project / "README.md").read_text()

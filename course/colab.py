"""The course on Google Colab: the first cell of every lesson and exercise, and what it calls once the course is there.

Colab has a torch that fits its GPU, an IPython that its page needs, and most other things in its own versions. So
nothing of that is replaced: only what is not there at all gets installed, and without its dependencies.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

# Nothing but the standard library is imported above: what a lesson needs may still be missing when this is imported.

ROOT = Path(__file__).resolve().parent.parent
NEVER_INSTALLED = {"torch", "triton"}  # another build than Colab's does not fit its driver
NOT_NEEDED = {"jupyterlab"}  # Colab has a page of its own

# The same in every notebook, under its title: nothing of the course is there yet when it runs.
FIRST_CELL = """\
# @title Fetches the course on Google Colab. In an installation of your own it does nothing.
import os
import subprocess
import sys

REPOSITORY = ""
if "google.colab" in sys.modules:
    folder = os.path.abspath("minillm-course")
    if not os.path.exists(folder):
        command = ["git", "clone", "--quiet", "--depth=1", REPOSITORY, folder]
        git = subprocess.run(command, capture_output=True, text=True)
        if git.returncode:
            sys.exit(f"Set REPOSITORY to the course's address, and run again. {git.stderr.strip()}")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from course.colab import set_up

    set_up()"""
# JupyterLab and Colab show the cell folded, Colab with its title. It prints nothing here, and nbval checks that.
FIRST_CELL_ID = "colab"
FIRST_CELL_METADATA = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["colab"]}


def first_cell(address: str) -> str:
    """The first cell of a notebook whose course is published at this address (empty while it is not)."""
    return FIRST_CELL.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')


def set_up() -> None:
    """Installs what is missing on this Colab machine, and prints what there is. A second call installs nothing."""
    missing = missing_requirements(ROOT / "pyproject.toml")
    if missing:
        install(missing)
    share_with_children()
    print(summary())


def missing_requirements(pyproject: Path) -> list[str]:
    """The requirements that a lesson needs and Colab lacks. An older version than the wanted one is not missing."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    by_name = {re.split(r"[^\w.-]", requirement)[0]: requirement for requirement in dependencies}
    left_alone = NEVER_INSTALLED | NOT_NEEDED
    return [by_name[name] for name in by_name if name not in left_alone and not is_installed(name)]


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed, in any version."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(requirements: list[str]) -> None:
    """Installs requirements with pip, without their dependencies; exits where pip fails."""
    # With their dependencies, pip could replace Colab's torch or IPython under the running notebook.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *requirements]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        sys.exit(f"pip could not install {', '.join(requirements)}: {pip.stderr.strip()}")
    importlib.invalidate_caches()


def share_with_children() -> None:
    """Lets the Python processes that a lesson starts import the course too. The path of this one is the cell's work."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *paths])


def summary() -> str:
    """Two lines: the versions, and the GPU with what it means for the course."""
    from course import doctor

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton") if is_installed(name)]
    gpu = doctor.cuda()
    return f"Python {platform.python_version()}, {', '.join(versions)}\n{gpu.name}: {gpu.found}; {gpu.meaning}"

"""The files that set the course up agree with each other, and with the code."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import kernels
from tools.hygiene import machine_paths, repository_files
from tools.setup_venv import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def read_constraints() -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def direct_dependencies() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(line) for group in (PROJECT["project"]["dependencies"], *extras) for line in group]


CONSTRAINTS = read_constraints()


@pytest.mark.parametrize("dependency", direct_dependencies(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_to_a_version_that_pyproject_allows(dependency):
    pin = CONSTRAINTS[canonicalize_name(dependency.name)]
    (version,) = [specifier.version for specifier in pin.specifier if specifier.operator == "=="]
    assert dependency.specifier.contains(version)
    assert pin.marker == dependency.marker


def test_every_constraint_is_one_exact_version_without_a_local_build():
    for pin in CONSTRAINTS.values():
        assert re.fullmatch(r"==[\d.]+(?:\.post\d+)?", str(pin.specifier)), f"{pin} is no plain pin"


def test_every_package_that_the_code_imports_is_declared():
    ours = ("minillm", "kernels", "course", "grading", "tools", "benchmarks", "tests")
    modules = [path for folder in ours for path in (ROOT / folder).rglob("*.py")]
    imported = set().union(*(imported_packages(path.read_text()) for path in modules))
    declared = {canonicalize_name(dependency.name) for dependency in direct_dependencies()}
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        name
        for name in imported - set(ours) - sys.stdlib_module_names - {"protocol"}  # beside the grader's worker
        if declared.isdisjoint(map(canonicalize_name, providers.get(name, [name])))
    }
    assert not undeclared


def test_flash_attn_is_in_no_extra():
    """It has only a source package, whose build needs torch: in an extra it breaks the whole installation."""
    assert "flash-attn" not in {canonicalize_name(requirement.name) for requirement in direct_dependencies()}


def test_conda_installs_the_same_project_as_make():
    (pip_lines,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert pip_lines == ["--constraint constraints.txt", f"--editable .[{EXTRAS}]"]
    assert set(EXTRAS.split(",")) == set(PROJECT["project"]["optional-dependencies"])
    assert ENVIRONMENT["name"] == PROJECT["project"]["name"]


def test_conda_make_and_pyproject_want_the_same_pythons():
    (python,) = [entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python ")]
    assert SpecifierSet(python.removeprefix("python ")) == SpecifierSet(PROJECT["project"]["requires-python"])
    oldest, newest = re.search(r"not (\(.*?\)) <= sys.version_info\[:2\] <= (\(.*?\))\)", MAKEFILE).groups()
    assert (oldest, newest) == ("(3, 11)", "(3, 13)")
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"


def test_conda_asks_for_nothing_but_python_and_pip():
    names = [re.split(r"[ <>=]", entry)[0] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    assert names == ["python", "pip"]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert kernels.__version__ == citation["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_make_target_says_what_it_does():
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    described = re.findall(r"^([a-z-]+):.*## \S", MAKEFILE, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert targets == described
    assert sorted(phony) == sorted(targets)


def test_the_checkpoints_files_are_part_of_the_package():
    package = ROOT / "minillm"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["minillm"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in (package / "checkpoints").rglob("*") if path.is_file()}
    left_out = {path.name for path in files - packaged if path.suffix not in {".md", ".png", ".svg"}}
    assert not left_out


@pytest.mark.parametrize(
    "package", [line.rstrip("*") for line in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
)
def test_type_checkers_read_an_installed_package(package):
    assert (ROOT / package / "py.typed").exists()
    assert PROJECT["tool"]["setuptools"]["package-data"]["*"] == ["py.typed"]


def test_ci_does_what_a_contributor_does():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0].startswith("#!") and "set -euo pipefail" in lines and lines[-1] == "make test"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout: files were not searched for machine paths")
def test_no_file_names_a_path_of_one_machine():
    found = {}
    for path in repository_files(ROOT):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture, or weights
        if paths := machine_paths(text):
            found[str(path.relative_to(ROOT))] = paths
    assert not found


# Without their first slash, so that this file passes the test above.
@pytest.mark.parametrize("path", ["home/ada", "root/x", "work/main", "Users/ada", "tmp/x.py", "var/folders/x"])
def test_a_machine_path_is_found_wherever_it_stands(path):
    assert machine_paths(f'File "/{path}/model.py", line 3')
    assert machine_paths(f"see file:///{path}")


@pytest.mark.parametrize("backslash", ["\\", "\\\\"], ids=["as it is", "escaped"])
def test_a_windows_path_is_found(backslash):
    assert machine_paths(f"C:{backslash}Users{backslash}ada")


@pytest.mark.parametrize(
    "text", ["https://example.org/home/page", "../work/notes", "and/or", "./tmp/x", r"A:\mathbb{R}"]
)
def test_an_address_or_a_relative_path_is_no_machine_path(text):
    assert not machine_paths(text)


def imported_packages(source: str) -> set[str]:
    """The top-level packages that a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "above"),
    [
        ("kernels", {"minillm", "course", "benchmarks", "grading", "tools"}),
        ("minillm", {"course", "benchmarks", "grading", "tools"}),
        ("course", {"benchmarks", "grading", "tools"}),
        ("grading", {"benchmarks", "tools"}),
    ],
)
def test_imports_only_ever_go_down(package, above):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    upward = {path.name: imported_packages(path.read_text()) & above for path in modules}
    assert not {name: packages for name, packages in upward.items() if packages}


def test_an_import_is_found_however_it_is_written():
    source = "import numpy as np\ndef late():\n    from course.figures import palette\n    from . import near\n"
    assert imported_packages(source) == {"numpy", "course"}

"""The plan of the house holds: imports go down, files stay short, public names are described. Each rule can fail."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tools.architecture import FLOOR_OF, PICTURE, PLACES, describe, direct, draw
from tools.imports import (
    INSIDE,
    ROOMS,
    ROOT,
    Module,
    edges,
    find_cycle,
    find_imports,
    find_violations,
    read_modules,
    table,
)

MODULES = read_modules()
IMPORTS = find_imports(MODULES)

LONGEST = 350  # lines of a Python file
LONGER: dict[str, str] = {}  # a longer file: its path, and the reason why it is not divided

# Their functions carry Gluon's names and do what Gluon's documentation says of them.
GLUON = {"kernels.emulator.arithmetic", "kernels.emulator.language"}


def test_every_import_is_one_that_the_plan_allows():
    assert find_violations(IMPORTS) == []


def test_the_plan_itself_only_goes_down():
    assert ROOMS.keys() == {room for room in FLOOR_OF if room != "torch, triton"}
    assert all(FLOOR_OF[room] < FLOOR_OF[below] for room, allowed in ROOMS.items() for below in allowed)


def test_every_room_and_every_part_that_has_rules_is_there():
    assert {name.split(".")[0] for name in MODULES} == ROOMS.keys()
    assert MODULES.keys() >= INSIDE.keys()


def test_no_modules_import_each_other_in_a_circle():
    assert find_cycle(MODULES) == []


def test_every_folder_with_python_in_it_is_a_room():
    others = {"tests", "build", "runs"}  # not shipped, not read
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - others
    assert folders <= ROOMS.keys()


def test_no_file_is_longer_than_the_ceiling_without_a_reason():
    assert long_files(ROOT).keys() - LONGER.keys() == set()


def test_a_reason_that_is_no_longer_needed_is_taken_out():
    assert LONGER.keys() - long_files(ROOT).keys() == set()


def test_every_public_function_and_class_has_a_docstring():
    assert list(without_docstring(module for name, module in MODULES.items() if name not in GLUON)) == []


def test_the_stored_picture_shows_the_imports_of_today():
    assert PICTURE.read_text(encoding="utf-8") == draw(set(edges(IMPORTS))), "stale: make architecture"


# From here on the rules are broken on purpose, in a tree of their own.


@pytest.fixture
def plant(tmp_path):
    """Writes {path: source} to a folder and returns what is read from there."""

    def plant_files(files: dict[str, str]) -> dict[str, Module]:
        for path, source in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        return read_modules(tmp_path)

    return plant_files


INNOCENT = {
    "course/grading_words.py": "",
    "kernels/__init__.py": "",
    "kernels/gluon_names.py": "",
    "kernels/runtime.py": "",
    "kernels/hopper/__init__.py": "",
    "kernels/hopper/launch.py": "from kernels import gluon_names",
    "kernels/emulator/launch.py": "from kernels.gluon_names import gl\nfrom . import values",
    "kernels/emulator/values.py": "import kernels.emulator.launch",
    "minillm/__init__.py": "",
    "minillm/attention/__init__.py": "",
    "minillm/attention/keys.py": "from kernels.runtime import prepare\nimport torch, course_of_action",
    "minillm/cache/__init__.py": "from minillm.attention.keys import Keys",
    "minillm/measure/traffic.py": "",
    "minillm/model.py": "from . import cache\nfrom .attention import keys",
    "grading/__init__.py": "",
    "tools/run_tests.py": "",
}


def test_a_tree_that_follows_the_plan_has_no_violation(plant):
    assert find_violations(find_imports(plant(INNOCENT))) == []


@pytest.mark.parametrize(
    ("path", "source", "violation"),
    [
        ("kernels/tiles.py", "import minillm.cache", "kernels.tiles, line 1, imports minillm.cache"),
        ("kernels/tiles.py", "def f():\n  from minillm import cache", "kernels.tiles, line 2, imports minillm.cache"),
        (
            "kernels/tiles.py",
            "import importlib\nimportlib.import_module('minillm.cache')",
            "line 2, imports minillm.cache",
        ),
        ("kernels/tiles.py", "x = __import__('minillm.cache')", "kernels.tiles, line 1, imports minillm.cache"),
        ("minillm/rope.py", "from course.grading_words import x", "imports course.grading_words"),
        ("minillm/rope.py", "try:\n    import grading\nexcept ImportError: pass", "line 2, imports grading"),
        ("course/doctor.py", "from grading import release", "course.doctor, line 1, imports grading"),
        ("course/doctor.py", "import tools.run_tests as r", "course.doctor, line 1, imports tools.run_tests"),
        ("benchmarks/gpu.py", "from course import grading_words", "imports course.grading_words"),
        ("minillm/attention/backends.py", "from ..cache import KVCache", "imports minillm.cache"),
        (
            "minillm/attention/backends.py",
            "from minillm import MiniLLM",
            "minillm.attention.backends, line 1, imports min",
        ),
        ("minillm/cache/paged.py", "from minillm.attention import attention", "line 1, imports minillm.attention"),
        ("minillm/measure/budget.py", "from minillm.attention import keys", "imports minillm.attention.keys"),
        (
            "kernels/emulator/units.py",
            "from ..hopper.launch import plan",
            "units, line 1, imports kernels.hopper.launch",
        ),
        ("kernels/compiling/job.py", "import kernels.hopper.launch", "compiling.job, line 1, imports kernels.hopper"),
    ],
)
def test_a_planted_import_is_named(plant, path, source, violation):
    (found,) = find_violations(find_imports(plant(INNOCENT | {path: source})))
    assert violation in str(found)


def test_a_notebook_is_read_too_and_its_magics_are_not(plant):
    notebook = '{"cells": [{"cell_type": "markdown", "source": ["import tools"]}, {"cell_type": "code", "source": '
    notebook += (
        '["%matplotlib inline\\n", "import grading\\n", "for x in ():\\n", "    !ls"]}, '
        '{"cell_type": "code", "source": ["%%bash\\n"]}]}'
    )
    modules = plant(INNOCENT | {"notebooks/01_one.ipynb": notebook})
    assert list(map(str, find_violations(find_imports(modules)))) == ["notebooks.01_one, line 2, imports grading"]


def test_a_timed_cell_is_python_too(plant):
    notebook = '{"cells": [{"cell_type": "code", "source": ["%%time\\n", "import grading"]}]}'
    (found,) = find_violations(find_imports(plant(INNOCENT | {"notebooks/01_one.ipynb": notebook})))
    assert str(found) == "notebooks.01_one, line 2, imports grading"


def test_a_circle_is_named_and_a_late_import_makes_none(plant):
    files = {"minillm/a.py": "import minillm.b", "minillm/b.py": "import minillm.c"}
    assert find_cycle(plant(files | {"minillm/c.py": "def f():\n    import minillm.a"})) == []
    circle = find_cycle(plant(files | {"minillm/c.py": "import minillm.a"}))
    assert circle == ["minillm.a", "minillm.b", "minillm.c", "minillm.a"]


def test_a_long_file_is_named(plant, tmp_path):
    plant({"kernels/long.py": "\n" * (LONGEST + 1), "kernels/just_right.py": "\n" * LONGEST})
    assert long_files(tmp_path) == {"kernels/long.py": LONGEST + 1}


def test_a_missing_docstring_is_named(plant):
    source = (
        'class A: pass\nclass B:\n    """B."""\n    def m(): ...\n    def _n(): ...\nclass C(dict):\n    """C."""\n'
    )
    source += "    def update(): ...\ndef f(): ...\nasync def g(): ...\ndef _h(): ...\ndef main(): ...\n"
    modules = plant({"minillm/bare.py": source, "examples/bare.py": "def f(): ..."})
    assert list(without_docstring(modules.values())) == [f"minillm.bare.{name}" for name in ("A", "B.m", "f", "g")]


def test_the_table_counts_files_lines_and_imports(plant):
    modules = plant(
        {"kernels/a.py": "1\n2\n", "minillm/b.py": "import kernels.a", "minillm/c/d.py": "import minillm.b"}
    )
    rows = [line.split() for line in table(modules).splitlines()]
    assert rows[1:] == [["minillm", "2", "2", "1", "b.py", "kernels", "1"], ["kernels", "1", "2", "2", "a.py", "-"]]
    rows = [line.split() for line in table(modules, "minillm").splitlines()]
    assert rows[1:] == [["b", "1", "1", "1", "b.py", "-"], ["c", "1", "1", "1", "d.py", "b", "1"]]


def test_the_picture_leaves_out_what_follows_and_its_text_does_not():
    imported = {("course", "minillm"), ("minillm", "kernels"), ("course", "kernels")}
    assert direct(imported) == imported - {("course", "kernels")}
    assert "course imports kernels, minillm." in describe(imported)
    assert draw(imported).count("<line") == 3  # and the one from kernels to torch
    assert draw(imported) != draw(imported - {("course", "kernels")})


def test_every_room_has_its_place_in_the_picture():
    assert PLACES.keys() == FLOOR_OF.keys()


def long_files(root: Path) -> dict[str, int]:
    """The Python files of rooms and tests over the ceiling, with their lines."""
    paths = [path for room in (*ROOMS, "tests") for path in (root / room).rglob("*.py")]
    lengths = {path.relative_to(root).as_posix(): len(path.read_text().splitlines()) for path in paths}
    return {path: length for path, length in lengths.items() if length > LONGEST}


def without_docstring(modules: Iterable[Module]) -> Iterator[str]:
    """The public functions, classes and methods of packages without one; `main` is described by its module."""
    for module in modules:
        if module.path.suffix == ".py" and module.name.split(".")[0] != "examples":
            for node in module.tree.body:
                yield from (f"{module.name}.{name}" for name in _bare(node))


def _bare(node: ast.stmt) -> Iterator[str]:
    """What is public and has no docstring. A method of a class with a base class may be described there."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        if node.name.startswith("_") or node.name == "main":
            return
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} <= {"NamedTuple"}:
            yield from (f"{node.name}.{name}" for method in node.body for name in _bare(method))


# A row of docs/architecture.md: | `file.py`: `name`, `name` | what |
ROW = re.compile(r"^\| `([\w/]+\.py)`: ((?:`\w+`(?:, )?)+) \|", re.MULTILINE)


@pytest.mark.parametrize(("path", "names"), ROW.findall((ROOT / "docs" / "architecture.md").read_text()))
def test_the_ways_of_data_pass_where_the_page_says(path, names):
    tree = ast.parse((ROOT / path).read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert set(re.findall(r"\w+", names)) <= defined | assigned


def test_files_that_the_page_names_are_there():
    named = re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []

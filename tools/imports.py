"""The rooms of the repository, read from its sources without running them: which room imports which, and may it.

python -m tools.imports                     # a row a room: files, lines, longest file, imports
python -m tools.imports --inside minillm    # one level deeper: minillm's own modules and folders
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A room, and what it may import. The floors go down: a room stands above all that it imports.
ROOMS = {
    "examples": ("grading", "minillm", "kernels"),
    "notebooks": ("benchmarks", "course", "minillm", "kernels"),
    "exercises": ("course", "minillm", "kernels"),
    "solutions": ("course", "minillm", "kernels"),
    "grading": ("course", "minillm", "kernels"),
    "tools": ("course",),
    "benchmarks": ("minillm", "kernels"),
    "course": ("minillm", "kernels"),
    "minillm": ("kernels",),
    "kernels": (),
}
FLOORS = (
    ("examples",),
    ("notebooks", "exercises", "solutions", "grading"),
    ("tools", "benchmarks"),
    ("course",),
    ("minillm",),
    ("kernels",),
)
PYTHON_MAGICS = ("%%time", "%%timeit", "%%capture", "%%prun")  # a cell that begins so is Python below its first line

# What a part may import of its own room, beside itself.
INSIDE = {
    "minillm.attention": ("minillm.measure.traffic",),
    "minillm.cache": ("minillm.attention.keys", "minillm.config"),
    "minillm.measure": (),
    "kernels.emulator": ("kernels.gluon_names",),
    "kernels.compiling": ("kernels.runtime", "kernels.targets", "kernels.tuning"),
}


@dataclass(frozen=True)
class Module:
    """A Python file, or the code cells of a notebook.

    Attributes:
        name: dotted, such as "minillm.attention.online"; of an `__init__.py`, that of its package.
        path: relative to the root.
        lines: of the file; of a notebook, those of its code cells.
        tree: the parsed source.
    """

    name: str
    path: Path
    lines: int
    tree: ast.Module


@dataclass(frozen=True, order=True)
class Import:
    """One module imports another, at a line of its source."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}"


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    """The Python files and notebooks of all rooms, by dotted name.

    Raises:
        SyntaxError: where a file cannot be parsed.
    """
    paths = [path for room in ROOMS for path in sorted((root / room).rglob("*"))]
    sources = [path for path in paths if path.suffix in (".py", ".ipynb") and ".ipynb_checkpoints" not in path.parts]
    modules = [_read(path, path.relative_to(root)) for path in sources]
    return {module.name: module for module in modules}


def _read(path: Path, relative: Path) -> Module:
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "code"]
        source = "\n".join(_without_magics("".join(cell["source"])) for cell in cells)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, relative, len(source.splitlines()), ast.parse(source, str(relative)))


def _without_magics(cell: str) -> str:
    """A cell's Python, without IPython's commands (%timeit, !ls); of a cell in another language (%%bash), nothing."""
    if cell.startswith("%%") and not cell.startswith(PYTHON_MAGICS):
        return ""
    return "\n".join(
        line[: len(line) - len(line.lstrip())] + "pass" if line.lstrip().startswith(("%", "!")) else line
        for line in cell.splitlines()
    )


def find_imports(modules: dict[str, Module]) -> list[Import]:
    """Every import from one of these modules to another, also inside functions; other packages are left out.

    `from package import name` imports `package.name` where that is a module, and `package` otherwise.
    """
    found = set()
    for module in modules.values():
        for line, name in _imported_names(module):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != module.name:
                found.add(Import(module.name, name, line))
    return sorted(found)


def _imported_names(module: Module) -> Iterator[tuple[int, str]]:
    package = module.name.split(".")
    if module.path.name != "__init__.py":
        package.pop()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            parts = [*above, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def find_violations(imports: list[Import]) -> list[Import]:
    """The imports that ROOMS or INSIDE do not allow."""
    return [found for found in imports if not _allowed(found.module, found.target)]


def _allowed(module: str, target: str) -> bool:
    room = module.split(".")[0]
    if target.split(".")[0] != room:
        return target.split(".")[0] in ROOMS[room]
    part = ".".join(module.split(".")[:2])
    allowed = (part, *INSIDE[part]) if part in INSIDE else (room,)
    return any(f"{target}.".startswith(f"{prefix}.") for prefix in allowed)


def find_cycle(modules: dict[str, Module]) -> list[str]:
    """A circle of modules that import each other at their top level; empty where there is none."""
    imported: dict[str, set[str]] = {name: set() for name in modules}
    top = {name: Module(name, m.path, m.lines, ast.Module(_at_import(m.tree), [])) for name, m in modules.items()}
    for found in find_imports(top):
        imported[found.module].add(found.target)
    seen: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in seen:
            return []
        seen.add(name)
        return next((circle for below in sorted(imported[name]) if (circle := walk(below, [*way, name]))), [])

    return next((circle for name in imported if (circle := walk(name, []))), [])


def _at_import(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when a module is imported; those for type checkers do not."""
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def room_of(name: str, inside: str = "") -> str:
    """The room that a module stands in: the first part of its name; with `inside`, that room's own part."""
    parts = name.split(".")
    if inside and parts[0] == inside:
        return parts[1] if len(parts) > 1 else "__init__"
    return parts[0]


def edges(imports: list[Import], inside: str = "") -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another: {(room, imported room): number}.

    Args:
        imports: from `find_imports`.
        inside: a room whose parts are looked at instead, its modules and folders.
    """
    if inside:
        imports = [found for found in imports if {found.module.split(".")[0], found.target.split(".")[0]} == {inside}]
    pairs = ((room_of(found.module, inside), room_of(found.target, inside)) for found in imports)
    return Counter((above, below) for above, below in pairs if above != below)


def table(modules: dict[str, Module], inside: str = "") -> str:
    """A row for each room: its files, their lines, the longest of them, and the rooms that it imports."""
    imported = edges(find_imports(modules), inside)
    rooms: dict[str, list[Module]] = {}
    for module in modules.values():
        if not inside or module.name.split(".")[0] == inside:
            rooms.setdefault(room_of(module.name, inside), []).append(module)
    rows = [("", "files", "lines", "longest file", "imports")]
    for room, files in rooms.items():
        longest = max(files, key=lambda module: module.lines)
        below = ", ".join(f"{to} {count}" for (start, to), count in imported.items() if start == room) or "-"
        lines = sum(module.lines for module in files)
        rows.append((room, f"{len(files)}", f"{lines}", f"{longest.lines} {longest.path.name}", below))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{room:<{widths[0]}}  {files:>{widths[1]}}  {lines:>{widths[2]}}  {longest:<{widths[3]}}  {below}"
        for room, files, lines, longest, below in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.imports", description=__doc__.splitlines()[0])
    parser.add_argument("--inside", default="", choices=["", *ROOMS], help="show this room's own modules and folders")
    inside = parser.parse_args().inside
    modules = read_modules()
    print(table(modules, inside))
    for violation in find_violations(find_imports(modules)):
        print(f"not allowed: {violation}")


if __name__ == "__main__":
    main()

"""`make architecture`: draws docs/architecture.svg, the rooms and their imports, and prints the same as a table.

The picture changes when an import between two rooms comes or goes; a test compares it with the sources.
"""

from __future__ import annotations

import sys
from html import escape

from tools.imports import FLOORS, ROOT, edges, find_imports, find_violations, read_modules, table

PICTURE = ROOT / "docs" / "architecture.svg"
UNIT, HEIGHT, FLOOR, MARGIN = 75, 54, 96, 20  # pixels: a column, a box, from floor to floor, around it all

# Where a room stands on its floor, first and last column; and what it holds.
PLACES = {
    "examples": (9, 12, "scripts to copy from"),
    "notebooks": (0, 3, "the lessons"),
    "exercises": (3, 6, "the students' notebooks"),
    "solutions": (6, 9, "the instructor's notebooks"),
    "grading": (9, 12, "scores and feedback"),
    "benchmarks": (0, 2.2, "peers side by side"),
    "tools": (9.8, 12, "what make calls"),
    "course": (3, 9, "what lessons and exercises need"),
    "minillm": (0, 12, "the library: attention, caches, model, generation, measuring"),
    "kernels": (0, 12, "Triton and Gluon, an emulator, compiling without a GPU"),
    "torch, triton": (0, 12, ""),
}
FLOOR_OF = {room: floor for floor, rooms in enumerate((*FLOORS, ("torch, triton",))) for room in rooms}


def draw(imported: set[tuple[str, str]]) -> str:
    """The picture as SVG.

    Args:
        imported: (room, imported room). An arrow is drawn where no longer way down leads there; the others follow
            from the arrows, and the alternative text has them all.
    """
    width = 12 * UNIT + 2 * MARGIN
    height = len(FLOORS) * FLOOR + HEIGHT + 2 * MARGIN
    arrows = sorted(direct(imported)) + [("kernels", "torch, triton")]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
            f"<title>{escape(describe(imported))}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *(_arrow(above, below) for above, below in arrows),
            *(_box(room) for room in PLACES),
            "</svg>\n",
        ]
    )


def direct(imported: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that do not follow from others: a → c is left out where a → b and b → … → c stand."""

    def reaches(above: str, below: str) -> bool:
        return any(to == below or reaches(to, below) for start, to in imported if start == above)

    return {
        (above, below)
        for above, below in imported
        if not any(start == above and to != below and reaches(to, below) for start, to in imported)
    }


def describe(imported: set[tuple[str, str]]) -> str:
    """The alternative text: every import, a sentence a room."""
    sentences = [
        f"{room} imports {', '.join(sorted(below for above, below in imported if above == room))}."
        for room in PLACES
        if any(above == room for above, _ in imported)
    ]
    return " ".join(
        ["The rooms of the repository on their floors; arrows, which are imports, go down only.", *sentences]
    )


def _corner(room: str) -> tuple[float, float]:
    return MARGIN + PLACES[room][0] * UNIT, MARGIN + FLOOR_OF[room] * FLOOR


def _box(room: str) -> str:
    first, last, holds = PLACES[room]
    x, y = _corner(room)
    gap = 6
    middle = x + (last - first) * UNIT / 2
    fill = "#eee" if not holds else "#e3eefa"
    box = f'<rect x="{x + gap:g}" y="{y}" width="{(last - first) * UNIT - 2 * gap:g}" height="{HEIGHT}" rx="5" '
    box += f'fill="{fill}" stroke="#444"/>'
    name = f'<text x="{middle:g}" y="{y + (23 if holds else 33)}" font-size="17" font-weight="bold">{room}</text>'
    text = f'<text x="{middle:g}" y="{y + 42}" font-size="13">{escape(holds)}</text>' if holds else ""
    return box + name + text


def _arrow(above: str, below: str) -> str:
    """A straight line: down where the boxes overlap, else between the ends that face each other."""
    (a, b, _), (c, d, _) = PLACES[above], PLACES[below]
    if max(a, c) < min(b, d):
        start = stop = (max(a, c) + min(b, d)) / 2
    elif b <= c:
        start, stop = b - 0.4, c + 0.5
    else:
        start, stop = a + 0.4, d - 0.5
    top, bottom = _corner(above)[1] + HEIGHT, _corner(below)[1]
    ends = f'x1="{MARGIN + start * UNIT:g}" y1="{top}" x2="{MARGIN + stop * UNIT:g}" y2="{bottom - 2}"'
    return f'<line {ends} stroke="#444" stroke-width="1.5" marker-end="url(#head)"/>'


def main() -> int:
    """Prints and draws; returns 1 and draws nothing where an import is not allowed."""
    modules = read_modules()
    imports = find_imports(modules)
    print(table(modules))
    if violations := find_violations(imports):
        print(*(f"not allowed: {violation}" for violation in violations), sep="\n")
        return 1
    PICTURE.write_text(draw(set(edges(imports))), encoding="utf-8")
    print(f"drawn: {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

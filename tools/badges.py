"""`make badges`: writes the repository's address, from `[project.urls]`, wherever a reader on Colab needs it.

That is the first cell of every notebook and, since Colab opens notebooks from GitHub only, with a GitHub address a
badge under every title and in the table of README.md. Without an address nothing is changed.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from course.colab import FIRST_CELL_ID, first_cell
from tools import run_tests

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
LESSON_LINK = re.compile(r"\]\((notebooks/[\w./-]+\.ipynb)\)")

# Where a notebook's badge leads: a solution's to the exercise that is generated from it, badge and all.
FOLDERS = {"notebooks": "notebooks", "exercises": "exercises", "solutions": "exercises"}


def main() -> None:
    print(make_badges(ROOT))


def make_badges(root: Path) -> str:
    """Brings the README and all notebooks under `root` up to date; returns one line that says what was done."""
    address = repository_address(root / "pyproject.toml")
    if not address:
        return "No badges: pyproject.toml has no Repository under [project.urls] yet. Nothing was changed."
    changes = stale_files(root)
    for path, text in changes.items():
        path.write_text(text, encoding="utf-8")
    badges = "" if on_github(address) else " (no badges: Colab opens notebooks from GitHub only)"
    return f"{len(changes)} files changed for {address}{badges}."


def repository_address(pyproject: Path) -> str:
    """Where the course is published, as `git clone` takes it; empty while it is not."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def on_github(address: str) -> bool:
    """Whether an address is a repository on GitHub, the only ones that Colab opens."""
    return re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address) is not None


def stale_files(root: Path) -> dict[Path, str]:
    """The files that do not carry the address and badges that they should, each with the text that does."""
    address = repository_address(root / "pyproject.toml")
    texts = {path: with_address(path, root, address) for path in notebooks(root)}
    readme = root / "README.md"
    if readme.exists():
        texts[readme] = "".join(with_lesson_badge(line, address) for line in lines_of(readme.read_text("utf-8")))
    return {path: text for path, text in texts.items() if text != path.read_text(encoding="utf-8")}


def notebooks(root: Path) -> list[Path]:
    """The notebooks that carry a badge."""
    return [root / path for path in run_tests.notebooks(root, FOLDERS)]


def with_address(path: Path, root: Path, address: str) -> str:
    """A notebook's text, with the address in its first code cell and a badge under its title."""
    folder, *rest = path.relative_to(root).parts
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell.get("id") == FIRST_CELL_ID:
            cell["source"] = lines_of(first_cell(address))
    title = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title["source"] = with_title_badge(title["source"], badge(address, "/".join([FOLDERS[folder], *rest])))
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def with_title_badge(source: list[str], wanted: str) -> list[str]:
    """A title cell with this badge, or without one, as the paragraph under the title."""
    title, *paragraphs = "".join(source).split("\n\n")
    others = [paragraph for paragraph in paragraphs if not BADGE.fullmatch(paragraph)]
    return lines_of("\n\n".join([title, *([wanted] if wanted else []), *others]))


def with_lesson_badge(line: str, address: str) -> str:
    """A line of the README; in its table of lessons, a badge follows each link to one."""
    if not line.startswith("|"):
        return line
    bare = re.sub(f" {BADGE.pattern}", "", line)
    return LESSON_LINK.sub(lambda link: f"{link[0]} {badge(address, link[1])}".rstrip(), bare)


def badge(address: str, path: str) -> str:
    """A badge in Markdown that opens a notebook of the repository; empty where Colab cannot."""
    if not on_github(address):
        return ""
    repository = address.removeprefix("https://github.com/")
    return f"[![Open in Colab]({IMAGE})](https://colab.research.google.com/github/{repository}/blob/main/{path})"


def lines_of(text: str) -> list[str]:
    """The lines of a text, each with its newline, as a notebook stores them."""
    # Not splitlines(), which also splits where a notebook does not.
    return re.findall(r"[^\n]*\n|[^\n]+", text)


if __name__ == "__main__":
    main()

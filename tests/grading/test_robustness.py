"""How notebooks come back: a right answer keeps its points, and all else ends in a line that says what is wrong."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from rich.table import Table

from grading import output
from grading.__main__ import DONE, main
from grading.submission import (
    MAX_ENTRIES,
    MAX_FILE,
    Submission,
    choose,
    find_students,
    slug,
    text_answer,
    to_run,
)
from grading.unit import find_units
from tests.grading.notebooks import (
    FUNCTION,
    POINTS,
    RIGHT,
    WRONG,
    code,
    grade_id,
    handed_in,
    needs_bubblewrap,
    released,
    save,
    unit,
)
from tests.grading.test_attacks import everything_said, points, read_results

Notebook = dict[str, Any]


def without_metadata(notebook: Notebook) -> Notebook:
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"] = {}
        cell["id"] = f"other-{number}"
    return notebook


def by_colab(notebook: Notebook) -> Notebook:
    for number, cell in enumerate(without_metadata(notebook)["cells"]):
        cell["metadata"] = {"id": f"x{number}", "outputId": "y", "colab": {"base_uri": "https://example.org"}}
        cell["source"] = cell["source"].splitlines(keepends=True)
    return notebook | {"nbformat_minor": 0, "metadata": {"colab": {"provenance": []}, "kernelspec": {"name": "conda"}}}


def in_format_3(notebook: Notebook) -> Notebook:
    cells = []
    for cell in notebook["cells"]:
        kind = {"input": cell["source"], "language": "python"} if cell["cell_type"] == "code" else cell
        cells.append({"cell_type": cell["cell_type"], "metadata": {}, **kind})
    return {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""}, "worksheets": [{"cells": cells}]}


def without_tests(notebook: Notebook) -> Notebook:
    return notebook | {"cells": [cell for cell in notebook["cells"] if not grade_id(cell).startswith(f"{FUNCTION}-")]}


def backwards(notebook: Notebook) -> Notebook:
    return notebook | {"cells": notebook["cells"][::-1]}


HELPER = "def repeat(x, group):\n    return x.repeat_interleave(group, 2)\n"
WITH_HELPER = RIGHT.replace("x.repeat_interleave(group, 2)", "repeat(x, group)")
MAGICS = "%matplotlib inline\n%time x = 1\n!nvidia-smi\n%pip install nothing-at-all\n"
PLACEHOLDER = next(cell["source"] for cell in released()["cells"] if grade_id(cell) == FUNCTION)

# How it came back, and what its tests are worth.
RETURNED: dict[str, tuple[Callable[[], Notebook], float]] = {
    "as handed out": (released, 0),
    "the old notebook format, the answer twice, an older try and the empty cell below it": (
        lambda: in_format_3(handed_in(RIGHT, after=[RIGHT, WRONG, PLACEHOLDER])),
        POINTS,
    ),
    "saved by Colab, metadata gone, all cells in reverse, a helper below its use, no tests": (
        lambda: by_colab(backwards(without_tests(handed_in(WITH_HELPER, before=[HELPER])))),
        POINTS,
    ),
    "the answer in a cell of its own, magics, shell commands, a cell in Python 2": (
        lambda: handed_in(PLACEHOLDER, before=["print 'hello'", MAGICS, "%%time\nimport torch\n" + RIGHT]),
        POINTS,
    ),
    "an answer in Python 2": (lambda: handed_in(RIGHT + "    print 'done'\n"), 0),
    "a name that is not the task's": (lambda: handed_in(RIGHT.replace(FUNCTION, "my_attention")), 0),
}


@needs_bubblewrap
def test_a_right_answer_keeps_its_points_however_the_notebook_comes_back(tmp_path, monkeypatch, capsys):
    submitted, grades = tmp_path / "submitted", tmp_path / "grades"
    for name, (notebook, _) in RETURNED.items():
        save(notebook(), submitted / name / "homework (1).ipynb")
    monkeypatch.setattr(output, "to_html", lambda *_: "")
    assert main([str(submitted), "--unit", "01", "--grades", str(grades), "--seconds", "60", "--jobs", "1"]) == DONE
    results = read_results(grades)
    table = Table("came back", "points", title="Notebooks as they come back")
    for name in RETURNED:
        table.add_row(name, f"{points(results[name]):g}")
    Console(width=100).print(table)
    assert {name: points(results[name]) for name in RETURNED} == {name: worth for name, (_, worth) in RETURNED.items()}
    assert "SyntaxError: Missing parentheses" in everything_said(results["an answer in Python 2"])
    assert "(cell 6, line 9)" in results["an answer in Python 2"]["verdicts"][0]["message"]
    assert "no cell defines a function" in everything_said(results["a name that is not the task's"])


class Broken(NamedTuple):
    """Files that cannot be graded: by name their content, and what is said."""

    files: dict[str, bytes]
    says: str


ELSEWHERE = json.dumps({"cells": [code("print('my holidays')")], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
BROKEN = {
    "nothing": Broken({}, "no notebook of this unit was found"),
    "empty": Broken({"unit.ipynb": b""}, "unit.ipynb: is empty"),
    "broken JSON": Broken({"unit.ipynb": json.dumps(released()).encode()[:-100]}, "its JSON is broken (line 1)"),
    "a list": Broken({"unit.ipynb": b"[1, 2]"}, "its JSON is not an object"),
    "brackets": Broken({"unit.ipynb": b"[" * 100_000}, "its JSON is broken"),
    "no cells": Broken({"unit.ipynb": b'{"nbformat": 4}'}, "it has no cells"),
    "too large": Broken({"unit.ipynb": b" " * (MAX_FILE + 1)}, "is too large (32 MiB, at most 32): clear the outputs"),
    "something else": Broken({"unit.ipynb": ELSEWHERE.encode()}, "unit.ipynb: no notebook of this course"),
    "another unit": Broken({"unit.ipynb": json.dumps(released("02")).encode()}, "a notebook of 02_online_softmax"),
    "checkpoints only": Broken({".ipynb_checkpoints/unit.ipynb": b"{}"}, "no notebook of this unit was found"),
    "odd shapes": Broken({"unit.ipynb": b'{"cells": [1, {"metadata": 3, "source": {"a": 1}}]}'}, "no notebook of this"),
    "not text": Broken({"unit.ipynb": bytes(range(256)) * 50}, "its JSON is broken"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_graded_ends_in_a_line_that_says_why(name, tmp_path):
    for file, content in BROKEN[name].files.items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_bytes(content)
    (tmp_path / name).mkdir(exist_ok=True)
    submission = chosen(tmp_path)
    assert submission.file is None
    assert BROKEN[name].says in "\n".join(submission.remarks)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_any_encoding_is_read(tmp_path, encoding):
    answer = RIGHT + "# gr\u00fc\u00dfe\n"
    text = json.dumps(handed_in(answer), ensure_ascii=encoding == "latin-1")
    text = text.replace("\\u00fc", "\u00fc") if encoding == "latin-1" else text
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "unit.ipynb").write_bytes(text.encode(encoding))
    submission = chosen(tmp_path)
    assert submission.file and answer in [cell.source for cell in submission.file.cells]


def test_of_several_files_the_fullest_counts_then_the_newest(tmp_path):
    folder = tmp_path / "student"
    old = save(handed_in(RIGHT), folder / "a.ipynb")
    new = save(handed_in(RIGHT + "\n# again\n"), folder / "deep" / "down" / "b.ipynb")
    empty = save(released(), folder / "c.ipynb")
    for second, path in enumerate((old, new, empty)):
        os.utime(path, (second, second))
    submission = chosen(tmp_path)
    assert submission.file and submission.file.name == "deep/down/b.ipynb"
    left_out = "left out, for deep/down/b.ipynb is the fuller or the newer one"
    assert submission.remarks == (f"a.ipynb: {left_out}", f"c.ipynb: {left_out}")


def test_links_and_special_files_are_not_opened(tmp_path):
    elsewhere = save(handed_in(RIGHT), tmp_path / "elsewhere" / "unit.ipynb")
    folder = tmp_path / "submitted" / "student"
    folder.mkdir(parents=True)
    (folder / "link.ipynb").symlink_to(elsewhere)
    (folder / "folder").symlink_to(elsewhere.parent)
    os.mkfifo(folder / "pipe.ipynb")
    submission = chosen(tmp_path / "submitted")
    assert submission.file is None
    said = "\n".join(submission.remarks)
    assert "link.ipynb: is a link" in said and "pipe.ipynb: is no ordinary file" in said and "folder: is a link" in said


def test_folders_count_among_the_entries_and_those_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "student"
    save(handed_in(RIGHT), folder / "a.ipynb")
    (folder / "locked").mkdir()
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        (student,) = find_students(tmp_path)
        assert [(file.name, file.problem) for file in student.files if file.problem] == [
            ("locked/", "cannot be read: Permission denied")
        ]
        assert chosen(tmp_path).file
    for number in range(MAX_ENTRIES):
        (folder / f"folder-{number}").mkdir()
    (student,) = find_students(tmp_path)
    assert student.files[-1].problem == f"more than {MAX_ENTRIES} files and folders: the rest was not looked at"


def test_a_cell_that_takes_long_to_parse_does_not_hold_up_the_class(tmp_path):
    save(handed_in(RIGHT, before=['f"' + "{a}" * 60_000 + '"']), tmp_path / "student" / "unit.ipynb")
    start = time.process_time()  # parsing is done here: another process's load does not count
    submission = chosen(tmp_path)
    assert submission.file and len(to_run(submission.file, unit())) == 2
    assert time.process_time() - start < 5  # it was 18


def test_a_students_name_is_harmless_as_a_path_and_on_a_screen(tmp_path):
    names = ["ann", "..", "../../etc", "-rf", "=1+1", "a\nb", "\x1b[31m", "<b>", "Zo\u00eb", "Zoe\u0308", "a" * 250]
    slugs = [slug(name) for name in names]
    assert slugs[0] == "ann" and len(set(slugs)) == len(names)
    assert all(part.replace("_", "").replace("-", "").isalnum() and len(part) < 80 for part in slugs)
    for name in ("=1+1", "a\nb", "\x1b[31m", "<b>"):
        (tmp_path / name).mkdir()
    assert [student.name for student in find_students(tmp_path)] == ["\ufffd[31m", "<b>", "=1+1", "a\ufffdb"]


WORDS = "Each key is read once and used once."


@pytest.mark.parametrize("came_back", ["as it was", "without metadata", "twice", "in a cell below"])
def test_an_answer_in_words_is_found(tmp_path, came_back):
    notebook = released()
    (question,) = [cell for cell in notebook["cells"] if grade_id(cell) == "why-decode-waits"]
    place = notebook["cells"].index(question)
    if came_back == "twice":
        notebook["cells"].insert(place, dict(question))
    if came_back == "in a cell below":
        notebook["cells"].insert(place + 1, {"cell_type": "markdown", "metadata": {}, "source": WORDS})
    else:
        question["source"] = WORDS
    if came_back == "without metadata":
        without_metadata(notebook)
    save(notebook, tmp_path / "student" / "unit.ipynb")
    submission = chosen(tmp_path)
    assert submission.file
    assert text_answer(submission.file, unit().texts[0], unit()) == WORDS


def chosen(submitted: Path) -> Submission:
    """What the only student there handed in for unit 01."""
    (student,) = find_students(submitted)
    return choose(student, find_units())[unit().name]

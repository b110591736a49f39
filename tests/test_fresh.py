"""`make lab FRESH=1`: the lessons without outputs, and what a reader wrote into them stays."""

import re
from pathlib import Path

import nbformat
import pytest

from tools.fresh import FOLDER, copy_lessons
from tools.run_tests import ROOT


def lessons(root: Path, folder: str) -> dict:
    return {path.name: nbformat.read(path, as_version=4) for path in sorted((root / folder).glob("*.ipynb"))}


def test_a_copy_has_every_cell_of_its_lesson_and_no_output(tmp_path):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    made = copy_lessons(tmp_path)
    stored, copies = lessons(ROOT, "notebooks"), lessons(tmp_path, FOLDER)
    assert [path.name for path in made] == list(stored) == list(copies)
    for name, copy in copies.items():
        assert [cell.source for cell in copy.cells] == [cell.source for cell in stored[name].cells]
        code = [cell for cell in copy.cells if cell.cell_type == "code"]
        assert not any(cell.outputs or cell.execution_count for cell in code)


def test_a_lesson_that_was_begun_stays_and_one_that_was_deleted_comes_again(tmp_path):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    first, second, *_ = copy_lessons(tmp_path)
    first.write_text("mine")
    second.unlink()
    assert copy_lessons(tmp_path) == [second]
    assert first.read_text() == "mine"


def test_a_copy_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")

    def interrupted(_, path):
        Path(path).write_text("{half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nbformat, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copy_lessons(tmp_path)
    copy_lessons(tmp_path)
    assert list(lessons(tmp_path, FOLDER)) == list(lessons(ROOT, "notebooks"))


def test_git_leaves_the_folder_alone_and_make_opens_it():
    assert f"{FOLDER}/\n" in (ROOT / ".gitignore").read_text()
    recipe = re.search(r"^lab: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert "tools.fresh" in recipe and "FRESH" in recipe

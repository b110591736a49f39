"""What a run leaves: no old score for a new answer, no code of a hidden test, and all that people wrote."""

from __future__ import annotations

import csv
import html
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grading import __main__ as command
from grading import batch, bubblewrap, gradebook, output
from grading.__main__ import DONE, REFUSED, SOME_NOT, STOPPED, main
from grading.bubblewrap import SandboxError
from grading.feedback import annotated, to_html
from grading.grade import Result, Verdict
from grading.submission import shown, text_answer, to_run
from grading.unit import find_units
from tests.grading.notebooks import POINTS, RIGHT, grade_id, handed_in, save, unit

WORDS = "Each key is read once."
QUESTION = "why-decode-waits"


class Course:
    """A folder of submissions, a folder of grades, and a grader that runs nothing and is always content."""

    def __init__(self, folder: Path):
        self.submitted, self.grades = folder / "submitted", folder / "grades"
        self.graded: list[str] = []
        self.fails: set[str] = set()
        self.stop_after = 1000

    def hand_in(self, student: str, answer: str = RIGHT, words: str = "") -> None:
        notebook = handed_in(answer)
        (question,) = [cell for cell in notebook["cells"] if grade_id(cell) == QUESTION]
        question["source"] = words or question["source"]
        save(notebook, self.submitted / student / "unit.ipynb")

    def grade(self, *options: str) -> int:
        self.graded.clear()
        return main([str(self.submitted), "--unit", "01", "--grades", str(self.grades), *options])

    def in_processes(self, todo, *_):
        for one in todo:
            if len(self.graded) >= self.stop_after:
                raise KeyboardInterrupt
            self.graded.append(one.slug)
            yield batch._failed(one, "of a test") if one.slug in self.fails else content(one)

    def rows(self) -> dict[str, dict[str, str]]:
        with open(self.grades / "grades.csv", encoding="utf-8", newline="") as file:
            return {row["student"]: row for row in csv.DictReader(file)}

    def score(self, student: str) -> str:
        return self.rows()[student]["01_naive_attention"]

    def book(self):
        return gradebook._open(self.grades / "nbgrader" / "gradebook.db")


def content(one: batch.StudentUnit) -> Result:
    result = one.empty()
    result.remarks = list(one.submission.remarks)
    if file := one.submission.file:
        result.state, result.date, result.file = "graded", "2026-01-01T00:00:00+00:00", file.name
        result.cells = [
            {"number": cell.number, "source": cell.source, "error": None, "output": "printed\n"}
            for cell in to_run(file, one.unit)
        ]
        result.answers = {text.grade_id: text_answer(file, text, one.unit) for text in one.unit.texts}
    number = result.cells[0]["number"] if result.cells else None
    result.verdicts = [Verdict(test.grade_id, test.points, test.points, "right", number) for test in one.unit.tests]
    for text in one.unit.texts:
        result.verdicts.append(
            Verdict(text.grade_id, None if result.answers.get(text.grade_id) else 0, text.points, "")
        )
    return result


@pytest.fixture
def course(tmp_path, monkeypatch) -> Course:
    course = Course(tmp_path)
    monkeypatch.setattr(batch, "_in_processes", course.in_processes)
    monkeypatch.setattr(command, "find_bubblewrap", lambda: "bwrap")
    monkeypatch.setenv("MINILLM_PROGRESS", str(tmp_path / "progress.json"))
    # nbgrader starts a program that tells this, for seconds, with each new gradebook.
    monkeypatch.setattr("nbgrader.api.get_alembic_version", lambda: "for a test")
    page_of = output.to_html  # a third of a second each: only a person's comment is looked for in one
    monkeypatch.setattr(output, "to_html", lambda page, result: page_of(page, result) if result.comments else "")
    return course


def test_only_what_has_changed_is_graded_again(course):
    for name in ("ann", "ben"):
        course.hand_in(name)
    assert course.grade() == DONE and course.graded == ["ann", "ben"]
    assert course.grade() == DONE and course.graded == []
    assert course.score("ann") == course.score("ben") == "6"
    course.hand_in("ben", RIGHT + "\n# improved\n")
    assert course.grade() == DONE and course.graded == ["ben"]
    assert course.grade("--again") == DONE and course.graded == ["ann", "ben"]


def test_more_time_or_a_change_of_the_grader_grades_all_again(course, monkeypatch):
    course.hand_in("ann")
    course.grade()
    course.grade("--seconds", "40")  # an answer may have been too slow before
    assert course.graded == ["ann"]
    monkeypatch.setattr(batch, "grader_hash", lambda: "another")
    course.grade("--seconds", "40")
    assert course.graded == ["ann"]


def test_another_triton_is_another_grader(monkeypatch):
    monkeypatch.setattr(batch, "_version", lambda package: f"{package} 99")
    assert batch.grader_hash.__wrapped__() != batch.grader_hash()


def test_a_sandbox_asks_for_no_more_than_its_grader_may_have(monkeypatch):
    monkeypatch.setattr(bubblewrap.resource, "getrlimit", lambda _: (1 << 33, 1 << 33))
    assert f"--as={1 << 33}" in bubblewrap.prlimit(bubblewrap.Limits())


def test_see_remarks_means_that_something_could_not_be_read(course, capsys):
    course.hand_in("ann")
    course.hand_in("ben")
    save("", course.submitted / "ben" / "homework.ipynb")
    save("", course.submitted / "eve" / "homework.ipynb")
    course.grade("--unit", "")
    rows = course.rows()
    assert {name: row["state"] for name, row in rows.items()} == {
        "ann": "graded",
        "ben": "see remarks",
        "eve": "see remarks",
    }
    assert rows["ann"]["remarks"].count("not handed in") == 1 and "05_triton" in rows["ann"]["remarks"]
    assert "homework.ipynb: is empty" in rows["eve"]["remarks"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ann: ")]
    assert line.count("not handed in") == 1 and "no notebook" not in line


def test_a_run_that_was_stopped_shows_no_scores_and_goes_on_where_it_was(course):
    for name in ("ann", "ben", "eve"):
        course.hand_in(name)
    course.grade()
    for name in ("ann", "ben", "eve"):
        course.hand_in(name, RIGHT + "\n# improved\n")
    course.stop_after = 1
    assert course.grade() == STOPPED and course.graded == ["ann"]
    assert not (course.grades / "grades.csv").exists() and not (course.grades / "feedback").exists()
    assert not (course.grades / "nbgrader" / "gradebook.db").exists()
    course.stop_after = 1000
    assert course.grade() == DONE and course.graded == ["ben", "eve"]
    assert set(course.rows()) == {"ann", "ben", "eve"}


def test_a_grading_that_fails_leaves_no_older_score(course):
    course.hand_in("ann")
    course.grade()
    course.hand_in("ann", RIGHT + "\n# improved\n")
    course.fails = {"ann"}
    assert course.grade() == SOME_NOT
    assert (course.score("ann"), course.rows()["ann"]["state"]) == ("", "not graded")
    assert "of a test" in course.rows()["ann"]["remarks"]
    with course.book() as book:
        assert not [submission for assignment in book.assignments for submission in assignment.submissions]
    assert not list(course.grades.rglob("*.html"))
    course.fails = set()
    assert course.grade() == DONE and course.graded == ["ann"] and course.score("ann") == "6"


def test_what_people_gave_and_wrote_stays_as_long_as_the_answer_does(course):
    course.hand_in("ann", words=WORDS)
    course.grade("--unit", "")
    assert course.rows()["ann"]["state"] == "answers to be read"
    with course.book() as book:
        place = (QUESTION, unit().name, unit().name, "ann")
        book.find_grade(*place).manual_score = 1.5
        book.find_comment(*place).manual_comment = "Say *why*."
        book.db.commit()
    course.hand_in("ann", RIGHT + "\n# the same words\n", WORDS)
    course.grade("--unit", "")
    assert (course.score("ann"), course.rows()["ann"]["state"]) == ("7.5", "graded")
    page = course.grades / "feedback" / "ann" / f"{unit().name}.html"
    assert "<em>why</em>" in page.read_text(encoding="utf-8")
    with course.book() as book:
        assert book.find_grade(*place).score == 1.5 and not book.find_grade(*place).needs_manual_grade
    course.hand_in("ann", words="Other words.")
    course.grade("--unit", "")
    assert (course.score("ann"), course.rows()["ann"]["state"]) == ("6", "answers to be read")


def test_nbgrader_itself_reads_and_exports_the_gradebook(course, tmp_path, monkeypatch):
    from nbgrader.plugins import CsvExportPlugin

    monkeypatch.undo()  # its own version too
    monkeypatch.setattr(batch, "_in_processes", course.in_processes)
    monkeypatch.setattr(command, "find_bubblewrap", lambda: "bwrap")
    course.hand_in("ann")
    course.hand_in('=1+1,"x"')
    course.grade()
    with course.book() as book:
        CsvExportPlugin(to=str(tmp_path / "scores.csv")).export(book)
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["assignment"] == unit().name]
    assert {(row["score"], row["max_score"]) for row in rows} == {("6.0", "8.0")}
    for row in rows:
        assert re.fullmatch(r"[\w-]+", row["student_id"])
        folder = course.grades / "nbgrader" / "autograded" / row["student_id"] / unit().name
        assert (folder / f"{unit().name}.ipynb").is_file()


def test_a_name_or_a_remark_is_no_formula_in_the_table(course):
    course.hand_in('=HYPERLINK("x")')
    course.grade()
    (row,) = course.rows().values()
    assert row["folder"].startswith("'=")


def test_feedback_holds_the_answer_and_the_verdict_and_no_line_of_a_hidden_test(course):
    for each in find_units():
        result = Result("ann", "ann", each.name, "graded")
        result.verdicts = [Verdict(item.grade_id, 0, item.points, f"{item.grade_id}: not yet") for item in each.items]
        result.cells = [{"number": 0, "source": "def my_helper(): ...", "error": None, "output": "printed"}]
        page = html.unescape(re.sub(r"<[^>]*>", "", to_html(annotated(each, result), result)))
        lines = [line for test in each.tests for line in hidden_lines(test.source)]
        assert lines and not any(line in page for line in lines)
        assert "my_helper" in page and all(f"{item.grade_id}: not yet" in page for item in each.items)


def hidden_lines(source: str) -> list[str]:
    (hidden,) = re.findall(r"### BEGIN HIDDEN TESTS\n(.*?)### END HIDDEN TESTS", source, re.DOTALL)
    return [line for line in map(str.strip, hidden.splitlines()) if len(line) > 16]  # a name alone tells nothing


def test_what_a_student_wrote_is_only_text_in_the_feedback():
    evil = "<script>alert(1)</script> [x](javascript:alert(2)) <img src=x onerror=alert(3)> \x1b[31m [y][z] ![](x:y)"
    evil += "\n\n[z]: javascript:alert(4)\n\n<a href='JaVaScript:alert(5)'>x</a> <javascript:alert(6)>"
    result = Result(shown(evil), "evil", unit().name, "graded", file=shown(evil), remarks=[shown(evil)])
    result.verdicts = [Verdict(item.grade_id, 0, item.points, "not yet") for item in unit().items]
    result.answers = {QUESTION: evil}
    result.cells = [{"number": 0, "source": evil, "error": evil, "output": evil}]
    found = Dangerous()
    found.feed(page := to_html(annotated(unit(), result), result))
    assert "alert(1)" in page and "\x1b" not in page and not found.found


def test_a_page_holds_no_more_of_a_students_code_than_is_soon_made():
    result = Result("ann", "ann", unit().name, "graded")
    result.verdicts = [Verdict(item.grade_id, 0, item.points, "not yet") for item in unit().items]
    cells = ["first = 1\n", "(" * 3_000_000, "last = 1\n"]
    result.cells = [{"number": i, "source": s, "error": None, "output": ""} for i, s in enumerate(cells)]
    sources = [cell.source for cell in annotated(unit(), result).cells]
    assert "first = 1\n" in sources and sum(map(len, sources)) < 100_000


class Dangerous(HTMLParser):
    """Finds what would run, or load something, of what the test above wrote."""

    found = ""

    def handle_starttag(self, tag, attributes):
        for name, text in attributes:
            if name.startswith("on") or (text or "").lower().startswith(("javascript:", "x:")):
                self.found += f"<{tag} {name}={text}> "

    def handle_data(self, data):
        if self.cdata_elem == "script" and "alert(" in data:
            self.found += data


@pytest.mark.parametrize("case", ["no bubblewrap", "no folder", "an empty folder", "no such unit"])
def test_what_cannot_be_done_is_refused_with_the_cure(course, monkeypatch, capsys, case):
    course.hand_in("ann")
    said = "UNIT=99 is no unit: one of 01_naive_attention"
    options = ["--unit", "99"]
    if case == "no bubblewrap":
        said, options = "sudo apt install bubblewrap", []
        monkeypatch.setattr(command, "find_bubblewrap", bubblewrap.find_bubblewrap)
        monkeypatch.setenv("PATH", "/nowhere")
    if case == "no folder":
        said, options, course.submitted = "No such file", [], course.submitted / "not" / "here"
    if case == "an empty folder":
        said, options, course.submitted = "each student's notebooks lie in one", [], course.submitted / "ann"
    assert course.grade(*options) == REFUSED
    assert said in capsys.readouterr().err and not (course.grades / "grades.csv").exists()


def test_without_a_sandbox_nothing_runs_unless_it_is_said(course, monkeypatch):
    def missing():
        raise SandboxError("none")

    monkeypatch.setattr(command, "find_bubblewrap", missing)
    course.hand_in("ann")
    assert course.grade() == REFUSED and course.graded == []
    assert course.grade("--unsafe-no-sandbox") == DONE and course.graded == ["ann"]


class Deadly(batch.StudentUnit):
    """One that ends the process which grades it."""

    def empty(self) -> Result:
        if os.getpid() != int(self.key):
            os._exit(1)
        return super().empty()


def test_a_grader_process_that_dies_costs_only_the_unit_that_it_graded(tmp_path):
    nothing = batch.choose(batch.Student("ann", "ann"), [unit()])[unit().name]
    todo = [
        Deadly("bob", "bob", unit(), nothing, str(os.getpid())),
        batch.StudentUnit("ann", "ann", unit(), nothing, ""),
    ]
    results = {result.slug: result for result in batch.run(todo, tmp_path, 1, batch.Manner())}
    assert (results["ann"].state, results["bob"].state) == ("missing", "failed")
    assert "ended from outside" in results["bob"].remarks[-1]


def test_points_are_those_of_the_unit():
    assert sum(test.points for test in unit().tests) == POINTS

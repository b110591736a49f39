"""No attack gains a point that it did not earn, or harms another student's grade or the host."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from textwrap import dedent

from rich.console import Console
from rich.table import Table

from course.grading.__main__ import DONE, main
from course.grading.sandbox import ROOT
from tests.grading.attacks import ATTACKS, ON_TILING, Attack
from tests.grading.notebooks import POINTS, RIGHT, handed_in, needs_bubblewrap, save

SECRET = "the gradebook's own words"
NAMES = (  # of students
    '=HYPERLINK("http:··evil","grade")',
    "..-..-etc",
    "\x1b[31mred\n<script>alert(4)<·script>",
)
SECONDS = "4"  # for a call: an honest one takes 0.1


@needs_bubblewrap
def test_no_attack_gains_a_point_or_harms_a_neighbour(tmp_path, capsys):
    submitted, grades = tmp_path / "submitted", tmp_path / "grades"
    for name in ("honest", "zzz-honest", *NAMES):
        save(handed_in(RIGHT), submitted / name / "unit.ipynb")
    (submitted / "link").symlink_to(submitted / "honest")
    for name in ("linked-file", "pipe"):
        (submitted / name).mkdir()
    (submitted / "linked-file" / "unit.ipynb").symlink_to(submitted / "honest" / "unit.ipynb")
    os.mkfifo(submitted / "pipe" / "unit.ipynb")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        for name, attack in ATTACKS.items():
            cell = attack.cell.replace("COURSE", str(ROOT)).replace("PORT", str(server.getsockname()[1]))
            save(handed_in(dedent(attack.answer), [dedent(cell)] if cell else []), submitted / name / "unit.ipynb")
        assert main([str(submitted), "--unit", "01", "--grades", str(grades), "--seconds", SECONDS]) == DONE

    printed = capsys.readouterr().out
    results = read_results(grades)
    show_table(ATTACKS, results)
    assert len(ATTACKS) >= 20
    assert not stopped_otherwise(ATTACKS, results)
    assert [points(results[name]) for name in ("honest", "zzz-honest")] == [POINTS, POINTS]
    assert [points(results[name]) for name in ("link", "linked-file", "pipe")] == [0, 0, 0]
    assert len(results) == len(ATTACKS) + len(NAMES) + 5

    everything = "".join(map(everything_said, results.values()))
    assert not re.search(r"FOUND|WROTE|GOT|CONNECTED|unpickled", everything)
    table = (grades / "grades.csv").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in (grades / "feedback").rglob("*.html"))
    assert not any(code in text for code in "\x1b\x07" for text in (printed, table, pages))
    assert "alert(1)" in pages and not re.search(r"<script>alert|<img[^>]* onerror", pages)
    assert not re.search(r'^"?[=+@-]|,"?[=+@-]', table, re.MULTILINE)
    assert all(path.resolve().is_relative_to(grades) for path in grades.rglob("*"))


@needs_bubblewrap
def test_no_attack_on_what_is_counted_gains_a_point(tmp_path):
    submitted, grades = tmp_path / "submitted", tmp_path / "grades"
    for name, attack in ON_TILING.items():
        function = "grad_q" if "def grad_q" in attack.answer else "flash_forward"
        save(handed_in(dedent(attack.answer), name="03", function=function), submitted / name / "unit.ipynb")
    assert main([str(submitted), "--unit", "03", "--grades", str(grades)]) == DONE
    results = read_results(grades)
    show_table(ON_TILING, results)
    assert not stopped_otherwise(ON_TILING, results)


def show_table(attacks: Mapping[str, Attack], results: dict[str, dict]) -> None:
    table = Table("attack", "what it tried", "points", "what it got", title="Attacks on grading")
    for name, attack in attacks.items():
        result = results[name]
        got = f"{points(result):g}" + (" (earned)" if attack.earned else "")
        table.add_row(name, attack.tried, got, summary(result, attack))
    Console(width=150).print(table)


def stopped_otherwise(attacks: Mapping[str, Attack], results: dict[str, dict]) -> list[tuple]:
    """The attacks that got other points than they earned, or were not stopped where they should be."""
    found = []
    for name, attack in attacks.items():
        got, said = points(results[name]), everything_said(results[name])
        if got != attack.earned or attack.says not in said:
            found.append((name, got, said))
    return found


def read_results(grades: Path) -> dict[str, dict]:
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (grades / "results").rglob("*.json")]
    return {result["student"]: result for result in results}


def points(result: dict) -> float:
    return sum(verdict["points"] or 0 for verdict in result["verdicts"])


def everything_said(result: dict) -> str:
    words = [verdict["words"] for verdict in result["verdicts"]]
    said = [*words, *(f"{cell['output']}\n{cell['error']}" for cell in result["cells"])]
    return "\n".join(" ".join(text.split()) for text in said)


def summary(result: dict, attack: Attack) -> str:
    """The words with which the attack was stopped, or else the first complaint."""
    lines = everything_said(result).splitlines()
    line = next((line for line in lines if attack.says in line), lines[0])
    return line[max(0, line.find(attack.says) - 40) :][:140]

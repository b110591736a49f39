"""No attack gains a point that it did not earn, or harms another student's grade or the host."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from contextlib import closing
from functools import cache
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent

import pytest
from rich.console import Console
from rich.table import Table

from grading import ROOT, output
from grading.__main__ import DONE, main
from grading.remote import Patience
from grading.unit import find_units
from tests.grading.attacks import ATTACKS, Attack
from tests.grading.attacks_on_counts import ON_COUNTS
from tests.grading.notebooks import POINTS, RIGHT, handed_in, needs_bubblewrap, released, save, unit

NAMES = (  # of students
    '=HYPERLINK("http:··evil","grade")',
    "..-..-etc",
    "\x1b[31mred\n<script>alert(4)<·script>",
)
START = 20  # seconds of a busy machine, for the sandbox of each of three tests
ENDLESS = [name for name, attack in ATTACKS.items() if attack.endless]
OTHERS = [name for name in ATTACKS if name not in ENDLESS]
# An attack that ends by itself is given time to, on a busy machine too; for the others the test waits as long as said.
GROUPS = {
    "first half": (OTHERS[::2], Patience(60)),
    "second half": (OTHERS[1::2], Patience(60)),
    "endless": (ENDLESS, Patience(3)),
}


@needs_bubblewrap
@pytest.mark.parametrize(("names", "patience"), GROUPS.values(), ids=GROUPS)
def test_no_attack_gains_a_point_or_harms_a_neighbour(names, patience, tmp_path, capsys):
    submitted, grades = tmp_path / "submitted", tmp_path / "grades"
    attacks = {name: ATTACKS[name] for name in names}
    for name in ("honest", "zzz-honest"):
        save(handed_in(RIGHT), submitted / name / "unit.ipynb")
    for name in NAMES:
        save(released(), submitted / name / "unit.ipynb")
    (submitted / "link").symlink_to(submitted / "honest")
    for name in ("linked-file", "pipe"):
        (submitted / name).mkdir()
    (submitted / "linked-file" / "unit.ipynb").symlink_to(submitted / "honest" / "unit.ipynb")
    os.mkfifo(submitted / "pipe" / "unit.ipynb")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        for name, attack in attacks.items():
            cell = attack.cell.replace("COURSE", str(ROOT)).replace("PORT", str(server.getsockname()[1]))
            save(handed_in(dedent(attack.answer), [dedent(cell)] if cell else []), submitted / name / "unit.ipynb")
        options = ["--unit", "01", "--grades", str(grades), "--seconds", str(patience.call), "--jobs", "1"]
        assert main([str(submitted), *options]) == DONE

    printed = capsys.readouterr().out
    results = read_results(grades)
    show_table(attacks, results)
    assert len(ATTACKS) >= 20
    assert not stopped_otherwise(attacks, results)
    assert all(result["seconds"] < patience.unit + 3 * START for result in results.values())
    assert [points(results[name]) for name in ("honest", "zzz-honest")] == [POINTS, POINTS]
    assert [points(results[name]) for name in ("link", "linked-file", "pipe")] == [0, 0, 0]
    assert len(results) == len(attacks) + len(NAMES) + 5

    everything = "".join(map(everything_said, results.values()))
    assert not re.search(r"FOUND|WROTE|GOT|CONNECTED|unpickled", everything)
    table = (grades / "grades.csv").read_text(encoding="utf-8")
    pages = "".join(path.read_text(encoding="utf-8") for path in (grades / "feedback").rglob("*.html"))
    assert not any(code in text for code in "\x1b\x07" for text in (printed, table, pages))
    assert "alert(1)" in pages or "escape-codes" not in attacks
    assert not re.search(r"<script>alert|<img[^>]* onerror", pages)
    assert not re.search(r'^"?[=+@-]|,"?[=+@-]', table, re.MULTILINE)
    assert all(path.resolve().is_relative_to(grades) for path in grades.rglob("*"))


@needs_bubblewrap
def test_no_attack_on_what_is_counted_gains_a_point(tmp_path, monkeypatch):
    submitted, grades = tmp_path / "submitted", tmp_path / "grades"
    monkeypatch.setattr(output, "to_html", lambda *_: "")  # a page each takes longer than to grade some
    for number, names in enumerate(together(ON_COUNTS)):
        (first, *rest), (unit_name, function) = [dedent(ON_COUNTS[name].answer) for name in names], attacked(names[0])
        submission = handed_in(first, after=rest, name=unit_name, function=function)
        save(submission, submitted / str(number) / "unit.ipynb")
    assert main([str(submitted), "--grades", str(grades), "--seconds", "60", "--jobs", "1"]) == DONE
    students, results = read_results(grades), {}
    for number, names in enumerate(together(ON_COUNTS)):
        for name in names:
            verdicts = [v for v in students[str(number)]["verdicts"] if v["grade_id"].startswith(attacked(name)[1])]
            results[name] = students[str(number)] | {"verdicts": verdicts}
    show_table(ON_COUNTS, results)
    assert not stopped_otherwise(ON_COUNTS, results)


def together(attacks: Mapping[str, Attack]) -> list[list[str]]:
    """The attacks in notebooks, one on each function of a unit: a sandbox takes longer to start than an attack."""
    by_unit: dict[str, dict[str, list[str]]] = {}
    for name in attacks:
        unit_name, function = attacked(name)
        by_unit.setdefault(unit_name, {}).setdefault(function, []).append(name)
    rows = [row for functions in by_unit.values() for row in zip_longest(*functions.values())]
    return [[name for name in row if name] for row in rows]


@cache
def attacked(name: str) -> tuple[str, str]:
    """The unit and the function of an attack on what is counted."""
    found = [(unit.name, f) for unit in find_units() for f in unit.functions if f"def {f}(" in ON_COUNTS[name].answer]
    return found[0]


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
    handed_in = [result for result in results if result["file"] or result["unit"] == unit().name]
    return {result["student"]: result for result in sorted(handed_in, key=lambda result: bool(result["file"]))}


def points(result: dict) -> float:
    return sum(verdict["points"] or 0 for verdict in result["verdicts"])


def everything_said(result: dict) -> str:
    messages = [verdict["message"] for verdict in result["verdicts"]]
    said = [*messages, *(f"{cell['output']}\n{cell['error']}" for cell in result["cells"])]
    return "\n".join(" ".join(text.split()) for text in said)


def summary(result: dict, attack: Attack) -> str:
    """The line that says how the attack was stopped, or else the first complaint."""
    lines = everything_said(result).splitlines()
    line = next((line for line in lines if attack.says in line), lines[0])
    return line[max(0, line.find(attack.says) - 40) :][:140]

"""The table of exercises and the answers that they were tried on, at the end of the tests."""

from __future__ import annotations

from collections.abc import Iterator


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints a row for each answer that a test tried: what it was told, or that it was not as it should be."""
    rows = list(_rows(terminalreporter.stats))
    if not rows:
        return
    terminalreporter.section("exercises: what each answer was told")
    width = max(len(name) for _, name, _ in rows)
    for task in dict.fromkeys(task for task, _, _ in rows):
        own = [(name, told) for row_task, name, told in rows if row_task == task]
        right = sum(told == "right" for _, told in own)
        terminalreporter.write_line(f"{task}: {right} right answers, {len(own) - right} wrong ones")
        for name, told in own:
            terminalreporter.write_line(f"  {'✓' if told == 'right' else '✗'} {name:{width}}  {told}")


def _rows(stats: dict) -> Iterator[tuple[str, str, str]]:
    """The task, the answer's name, and what it was told, in the order of the tests' names."""
    reports = [report for outcome in ("passed", "failed") for report in stats.get(outcome, [])]
    found = [value for report in reports for key, value in report.user_properties if key == "exercise"]
    yield from sorted((tuple(row) for row in found), key=lambda row: (row[0], row[2] != "right", row[1]))

"""What the histories of the cache went through, and how each planted bug was found, at the end of the tests."""

from __future__ import annotations


def print_counts(terminalreporter) -> None:
    """Prints what tests have recorded under the name "cache", a line each."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = [value for report in reports for key, value in report.user_properties if key == "cache"]
    if lines:
        terminalreporter.section("KV cache: histories and planted bugs")
    for line in sorted(lines):
        terminalreporter.write_line(line)

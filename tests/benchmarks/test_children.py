"""What is slow, hangs, crashes or is wrong in `make bench-gpu` costs itself: the rest is checked and timed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.children import Child, ChildRun, Progress, run_children, supervise
from benchmarks.machine import Machine, Unable
from tests.benchmarks.copies import ROOT, bench_gpu, copy_with, stored

PLANTED = {
    "a_slow": {"checks": "range(5)", "check": "clock.sleep(100 if case == 1 else 0)"},
    "b_crash": {"time": "yield {'case': case}; case == 'b' and os.abort()"},
    "c_wrong": {"check": "raise AssertionError('planted')"},
    "e_no_suite": {"checks": "1 +"},
    "d_raises": {"time": "yield {'case': 1 / (case != 'a')}"},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    out = folder / "out"
    run = bench_gpu("--dry-run", "--minutes", 1.2, "--out", out, path=[ROOT, copy_with(folder, PLANTED)], timeout=200)
    return run, stored(out)


def cases(result: dict) -> list:
    return [row["case"] for row in result["rows"]]


def test_a_suite_whose_checks_are_too_slow_is_timed_all_the_same(planted):
    run, results = planted
    slow = results["a_slow"]
    assert cases(slow) == ["a", "b", "c"] and slow["cases left out of time"] == 0
    assert slow["checked"] <= 1 and slow["checked"] + slow["cases left out of check"] == 5
    assert set(slow["stopped by the deadline"]) <= {"1"} and not slow["failures"]
    assert f"ok, {slow['checked']} checks ({slow['cases left out of check']} cases left out: no time), 3" in run.stdout


def test_a_case_that_takes_the_process_down_costs_itself(planted):
    crash = planted[1]["b_crash"]
    assert cases(crash) == ["a", "b", "c"]  # what b had yielded before is kept
    assert crash["failure"] == "time: ended by SIGABRT (b)" and crash["checked"] == 1


def test_a_case_that_raises_costs_itself(planted):
    raises = planted[1]["d_raises"]
    assert cases(raises) == [1.0, 1.0] and raises["failure"] == "time: ZeroDivisionError: division by zero (a)"


def test_a_suite_that_cannot_be_imported_is_reported(planted):
    assert planted[1]["e_no_suite"]["failure"].startswith("check: SyntaxError: invalid syntax")


def test_what_is_wrong_is_not_timed(planted):
    run, results = planted
    wrong = results["c_wrong"]
    assert wrong["rows"] == [] and wrong["checked"] == 0 and wrong["cases left out of time"] == 3
    assert wrong["failure"] == "check: AssertionError: planted (one)"
    assert run.returncode == 1 and "FAILED in check: AssertionError: planted (one), 0 checks, 0 rows" in run.stdout


def one_child(folder, suite: dict[str, str], steps, patience=60.0) -> Progress:
    """Runs one child on a planted suite."""
    copy_with(folder, {"planted": suite})
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    now = time.monotonic()
    run = ChildRun("planted", [(step, now + seconds) for step, seconds in steps], str(folder / "progress.json"))
    # -P: the child's folder is the repository, whose own benchmarks would come first
    child = Child(run, [sys.executable, "-P", "-m", "benchmarks.work", "--dry-run"], environment, patience)
    (progress,) = run_children([child], lambda found: None)
    return progress


def test_a_tuning_candidate_or_a_peer_that_crashes_is_gone_on_without(tmp_path):
    time_it = """yield {'case': case, 'first': True}
    for name in ("good", "bad", "raises"):
        run = {"good": lambda: 1, "bad": os.abort, "raises": lambda: 1 / 0}[name]
        try:
            yield {'case': case, name: machine.attempt(name, run)}
        except Exception as error:
            yield {'case': case, name: str(error)}"""
    progress = one_child(tmp_path, {"time": time_it, "timings": '["a", "b"]'}, [("time", 100)])
    a = [row for row in progress.rows if row["case"] == "a"]
    assert a == [
        {"case": "a", "first": True},  # once, although the case was begun twice
        {"case": "a", "good": 1},
        {"case": "a", "bad": "ended by SIGABRT"},
        {"case": "a", "raises": "ZeroDivisionError: division by zero"},
    ]
    assert len(progress.rows) == 8 and progress.lost == {"bad": "ended by SIGABRT"} and not progress.failures


def test_a_timing_that_shows_no_life_is_given_up(tmp_path):
    hangs = {"time": "clock.sleep(100 * (case == 'b')); yield {'case': case}"}
    progress = one_child(tmp_path, hangs, [("time", 100)], patience=3.0)
    assert [row["case"] for row in progress.rows] == ["a", "c"]
    assert [failure["error"] for failure in progress.failures] == ["no end after 3 s"]


def test_only_what_a_failed_check_names_is_not_timed():
    machine = Machine(dry_run=True, failed={"tiles 1": "wrong"})
    with pytest.raises(Unable, match="wrong"):
        machine.attempt("tiles 1", lambda: 1)
    assert machine.attempt("tiles 2", lambda: 2) == 2


def test_a_benchmark_that_is_stopped_from_outside_leaves_its_rows_and_no_process(tmp_path):
    slow = {"time": "yield {'case': case, 'process': os.getpid()}; clock.sleep(100)"}
    path = os.pathsep.join([str(ROOT), str(copy_with(tmp_path, {"slow": slow}))])
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path / "out")]
    run = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    rows = []
    while run.poll() is None and not rows:
        time.sleep(0.1)
        rows = stored(tmp_path / "out").get("slow", {}).get("rows", [])
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 1
    assert [row["case"] for row in stored(tmp_path / "out")["slow"]["rows"]] == ["a"]
    with pytest.raises(ProcessLookupError):
        os.kill(rows[0]["process"], 0)


def test_what_does_not_end_is_killed():
    start = time.monotonic()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert supervise(sleep, 1.0, dict(os.environ)) == "no end after 1 s"
    assert supervise([sys.executable, "-c", "pass"], 30.0, dict(os.environ)) == ""
    assert time.monotonic() - start < 30


def test_progress_is_saved_whole(tmp_path):
    progress = Progress(running="a", rows=[{"case": "a"}])
    progress.end("time")
    progress.save(str(tmp_path / "progress.json"))
    assert Progress.load(str(tmp_path / "progress.json")) == progress
    assert json.loads((tmp_path / "progress.json").read_text())["ended"] == {"time": 1}

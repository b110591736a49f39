"""The stored measurement of `make bench`: where it comes from, and that it reaches what the README and lesson say."""

import json

import pytest

from benchmarks.record import ROOT, ratio, spread, take_turns
from course.lesson import stored_result

RESULT = stored_result("decode_cpu")


def test_a_result_says_where_it_comes_from():
    for path in (ROOT / "benchmarks" / "results").glob("*/decode_cpu.json"):
        result = json.loads(path.read_text())
        assert all(result[key] for key in ("device", "threads", "python", "versions", "date", "commit"))


def test_decoding_is_near_the_floor_and_ahead_of_transformers():
    ratios = {name: figures["median"] for name, figures in RESULT["decode"]["ratios"].items()}
    assert ratios["ours / floor"] >= 0.85
    assert ratios["ours / transformers"] >= 1.45
    assert ratios["ours, int8 / floor"] > 1


def test_prefill_is_not_slower_than_that_of_transformers():
    assert RESULT["prefill"]["ours / transformers"]["median"] >= 1


def test_runs_take_turns_and_the_first_turn_does_not_count():
    calls = []
    runs = {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b") or 2.0 * len(calls)}
    results = take_turns(runs, 3)
    assert calls == ["a", "b"] * 4 and results["a"] == [3, 5, 7]
    assert ratio(results, "b", "a")["median"] == pytest.approx(2 * 6 / 5)
    assert spread([1.0, 2.0, 3.0])["median"] == 2

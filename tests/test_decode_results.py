"""The measurement that the lesson quotes: where it comes from, and that it reaches what the README and lesson say.

It is a record of one machine. What `make bench` finds on another one stands beside it, and is not judged.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import decode_cpu
from benchmarks.record import ROOT, ratio, spread, take_turns
from course import lesson
from course.lesson import stored_result
from minillm import MiniLLM
from minillm.cache import KVCache
from minillm.checkpoint import to_transformers
from minillm.decode import Decoder
from tests.cache.models import random_model

RESULT = stored_result("decode_cpu")


def test_a_result_says_where_it_comes_from():
    for path in (ROOT / "benchmarks" / "results").glob("*/decode_cpu.json"):
        result = json.loads(path.read_text())
        assert all(result[key] for key in ("device", "threads", "python", "versions", "date", "commit"))


def test_the_lesson_quotes_one_machine_whatever_was_measured_since(tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "__file__", str(tmp_path / "course" / "lesson.py"))
    for machine, date in ((lesson.QUOTED_MACHINE, "2026-01-01"), ("my-laptop", "2026-12-31")):
        folder = tmp_path / "benchmarks" / "results" / machine
        folder.mkdir(parents=True)
        (folder / "some.json").write_text(json.dumps({"date": date}))
    assert stored_result("some") == {"date": "2026-01-01"}
    assert stored_result("some", "my-laptop") == {"date": "2026-12-31"}


def test_decoding_is_near_the_floor_and_ahead_of_transformers():
    ratios = {name: figures["median"] for name, figures in RESULT["decode"]["ratios"].items()}
    assert ratios["ours / floor"] >= 0.85
    assert ratios["ours / transformers"] >= 1.45
    assert ratios["ours, int8 / floor, int8"] >= 0.6


def test_at_a_long_context_the_floor_has_keys_and_values_too_and_decoding_is_near_it():
    curve = dict(zip(RESULT["context"]["length"], RESULT["context"]["cached / floor"], strict=True))
    assert curve[2000]["median"] >= 0.88


@pytest.mark.parametrize("weights", ["same", "int8"])
def test_the_floor_reads_what_a_step_reads_and_no_more(weights):
    model, length = MiniLLM(decode_cpu.CONFIG), 100
    products = {"same": decode_cpu.transposed_products, "int8": decode_cpu.int8_products}[weights](model)
    read = [product.args[1:] for product in decode_cpu.with_attention(products, length)]  # each one's first is x
    keys_and_values = KVCache(decode_cpu.CONFIG, 1, capacity=length).nbytes
    assert sum(tensor.nbytes for tensors in read for tensor in tensors) == (
        Decoder(model, weights).nbytes + keys_and_values
    )


def test_prefill_is_not_slower_than_that_of_transformers():
    assert RESULT["prefill"]["ours / transformers"]["median"] >= 1


def test_the_rate_of_transformers_is_that_of_its_steps_alone(monkeypatch):
    now = iter([0.0, 7.0, 8.0, 9.0, 11.0])  # the prompt, the first token, and three steps in four seconds
    monkeypatch.setattr(decode_cpu, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert decode_cpu.their_rate(to_transformers(random_model()), torch.tensor([[1, 2, 3]]), 3) == 3 / 4


def test_runs_take_turns_and_the_first_turn_does_not_count():
    calls = []
    runs = {"a": lambda: calls.append("a") or len(calls), "b": lambda: calls.append("b") or 2.0 * len(calls)}
    results = take_turns(runs, 3)
    assert calls == ["a", "b"] * 4 and results["a"] == [3, 5, 7]
    assert ratio(results, "b", "a")["median"] == pytest.approx(2 * 6 / 5)
    assert spread([1.0, 2.0, 3.0])["median"] == 2

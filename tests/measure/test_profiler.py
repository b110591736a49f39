"""The profiler: what it counts, what it costs when it is off, and advice that follows from the figures."""

import time

import pytest
import torch

from minillm.measure import Profile, phase, profile, record_peak
from minillm.measure.profiler import Phase


def work(megabytes=4, seconds=0.0):
    with phase("prefill", tokens=10, nbytes=lambda: 1000):
        torch.ones(megabytes * 2**18)
        time.sleep(seconds)
    for _ in range(3):
        with phase("decode", tokens=2, nbytes=lambda: 100):
            pass


def test_phases_are_counted_timed_and_kept_apart():
    with profile() as report:
        work(seconds=0.02)
    assert {name: p.tokens for name, p in report.phases.items()} == {"prefill": 10, "decode": 6}
    assert [len(p.seconds) for p in report.phases.values()] == [1, 3]
    assert 0.02 <= report.phases["prefill"].seconds[0] < 1
    assert report.phases["prefill"].peak_bytes == 0


def test_memory_is_the_peak_of_what_a_phase_allocates():
    with profile(log_latency=False, log_memory=True) as report:
        work()
    assert report.phases["prefill"].peak_bytes == 4 * 2**20
    assert not report.phases["prefill"].seconds and report.suggestions() == []
    with record_peak() as peak:
        torch.ones(1000)
    assert peak == [4000]


def test_off_it_calls_nothing_and_costs_next_to_nothing():
    phase("decode", 1, lambda: pytest.fail("nobody asked"))
    start = time.perf_counter()
    for _ in range(1000):
        with phase("decode", 1, int):
            pass
    assert time.perf_counter() - start < 0.02  # a decode step of the smallest model takes a thousand times as long


def test_a_profile_ends_with_its_block():
    with pytest.raises(RuntimeError), profile() as report:
        raise RuntimeError
    work()
    assert not report.phases


def made_of(**phases) -> Profile:
    report = Profile(log_latency=True, log_memory=False, device="cpu")
    report.phases = {
        name: Phase(tokens=len(times), nbytes=[10**8] * len(times), seconds=times) for name, times in phases.items()
    }
    return report


def test_the_advice_follows_from_the_figures():
    at_the_limit = made_of(prefill=[0.1], decode=[0.01] * 100)  # 10 GB/s
    assert at_the_limit.suggestions(bandwidth=12e9) == [
        "decode takes 91% of the time: a batch shares each step's reading of the weights",
        "decode reads 10.0 GB/s of the 12.0 GB/s that this machine reads: memory is the limit, only fewer bytes help "
        "(weights='int8', fewer KV heads)",
    ]
    (share, reading) = made_of(prefill=[3.0], decode=[0.01] * 100).suggestions(bandwidth=100e9)
    assert share.startswith("prefill takes 75% of the time: shorten the prompt")
    assert "memory is not the limit" in reading
    slower = made_of(decode=[0.01] * 50 + [0.02] * 50).suggestions(bandwidth=12e9)
    assert slower[-1] == "a step grew from 10.00 to 20.00 ms: the cache outgrows the weights"


def test_the_report_has_a_line_for_each_phase_and_for_each_advice():
    text = str(made_of(prefill=[0.1], decode=[0.01] * 4))
    assert [line.split()[0] for line in text.splitlines()] == ["phase", "prefill", "decode", "-", "-"]
    with profile(log_memory=True) as report:
        work()
    assert "log one of the two" in str(report)

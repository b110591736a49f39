"""The profiler: what it counts, what it costs when it is off, and advice that follows from the figures."""

import time

import pytest
import torch

from minillm.measure import Phase, Profile, Reads, phase, profile, profiler, record_peak


def work(megabytes=4, seconds=0.0):
    with phase("prefill", tokens=10, reads=lambda: Reads(1000)):
        torch.ones(megabytes * 2**18)
        time.sleep(seconds)
    for _ in range(3):
        with phase("decode", tokens=2, reads=lambda: Reads(90, 10)):
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
    phase("decode", 1, lambda: pytest.fail("called where no profile is on"))
    start = time.process_time()
    for _ in range(1000):
        with phase("decode", 1, lambda: pytest.fail("called where no profile is on")):
            pass
    assert time.process_time() - start < 0.02  # a decode step of the smallest model takes a thousand times as long


def test_a_profile_ends_with_its_block():
    with pytest.raises(RuntimeError), profile() as report:
        raise RuntimeError
    work()
    assert not report.phases


def made_of(weights=10**8, cache=0, **phases) -> Profile:
    report = Profile(log_latency=True, log_memory=False, device="cpu")
    report.phases = {
        name: Phase(tokens=len(times), reads=[Reads(weights, cache)] * len(times), seconds=times)
        for name, times in phases.items()
    }
    return report


def test_the_advice_follows_from_the_figures():
    at_the_limit = made_of(prefill=[0.1], decode=[0.01] * 100)  # 10 GB/s
    assert at_the_limit.suggestions(bandwidth=12e9) == [
        "decode takes 91% of the time: a batch shares each step's reading of the weights",
        "decode reads the 95.37 MiB of a step at 10.0 GB/s, of the 12.0 GB/s that this machine reaches: memory is "
        "the limit, only fewer bytes help, and 100% of them are weights (8 bits for each)",
    ]
    (_, reading) = made_of(weights=10**7, cache=3 * 10**7, decode=[0.01] * 100).suggestions(bandwidth=5e9)
    assert reading.endswith("and 75% of them are cache (fewer KV heads, a shorter context)")
    (share, reading) = made_of(prefill=[3.0], decode=[0.01] * 100).suggestions(bandwidth=100e9)
    assert share.startswith("prefill takes 75% of the time: shorten the prompt")
    assert "memory is not the limit" in reading


def test_a_step_that_grows_is_put_down_to_the_cache_only_where_that_grows_with_it():
    slower = made_of(decode=[0.01] * 50 + [0.02] * 50)
    told = "a step took 10.00 ms at first and 20.00 at the end, 100% more, and read "
    assert slower.suggestions(bandwidth=12e9)[-1] == f"{told}only 0% more: look for what else slows it down"
    slower.phases["decode"].reads = [Reads(10**8, 10**6 * step) for step in range(100)]
    assert slower.suggestions(bandwidth=12e9)[-1].startswith(f"{told}67% more: the cache grows")


def test_the_limit_is_that_of_reading_as_many_bytes(monkeypatch):
    """The weights of a small model fit the processor's cache, which is many times as fast as the memory behind it."""
    asked = []
    monkeypatch.setattr(profiler, "read_bandwidth", lambda nbytes, device: asked.append(nbytes) or 1e9)
    made_of(weights=3_000_000, cache=700_000, decode=[0.01] * 4).suggestions()
    assert asked == [3_700_000]


def test_the_bandwidth_is_what_sums_over_so_many_bytes_reach():
    start = time.perf_counter()
    torch.ones(10**6).sum()
    assert profiler.read_bandwidth(4 * 10**6) > 4 * 10**6 / (time.perf_counter() - start)


def test_the_report_has_a_line_for_each_phase_and_for_each_advice(monkeypatch):
    monkeypatch.setattr(profiler, "read_bandwidth", lambda nbytes, device: 1e9)
    text = str(made_of(prefill=[0.1], decode=[0.01] * 4))
    assert [line.split()[0] for line in text.splitlines()] == ["phase", "prefill", "decode", "-", "-"]
    with profile(log_memory=True) as report:
        work()
    assert "log one of the two" in str(report)

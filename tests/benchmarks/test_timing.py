"""Times on a simulated GPU: the host queues, the stream works behind it, and what is measured is the kernel."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

from benchmarks import timing
from benchmarks.attention import LOOPS, able, compare
from benchmarks.correctness import memory_full_of_nan
from benchmarks.machine import Machine

LAUNCH, FLUSH = 2e-6, 1e-4  # seconds of the host, and of the GPU


class Stream:
    """A host and a GPU, both in seconds of their own clock."""

    def __init__(self) -> None:
        self.host = self.gpu = 0.0

    def queue(self, seconds: float, host: float = LAUNCH) -> float:
        """The host launches work, and the GPU begins it when both are ready. Returns when it ends."""
        self.host += host
        self.gpu = max(self.gpu, self.host) + seconds
        return self.gpu

    def wait(self) -> None:
        self.host = max(self.host, self.gpu)


class Event:
    stream: Stream

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = self.stream.queue(0.0)

    def query(self) -> bool:
        return self.at <= self.stream.host

    def synchronize(self) -> None:
        self.stream.host = max(self.stream.host, self.at)

    def elapsed_time(self, after: Event) -> float:
        return (after.at - self.at) * 1000


@pytest.fixture
def stream(monkeypatch) -> Stream:
    stream = Event.stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", stream.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stream.queue(cycles / timing.CYCLES), raising=False)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: stream.host)
    return stream


class Buffer:
    """Larger than the cache."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def zero_(self) -> None:
        self.stream.queue(FLUSH)


def times(stream: Stream, **functions) -> dict[str, timing.Timing]:
    return timing.on_gpu(functions, 1.0, Buffer(stream), nullcontext())  # type: ignore[arg-type]


def test_a_kernel_shorter_than_its_launch_is_timed_and_not_the_launch(stream):
    def short() -> None:
        for _ in range(3):  # a backward: three kernels
            stream.queue(10e-6, host=150e-6)

    found = times(stream, short=short)["short"]
    assert found.median == pytest.approx(0.030) and found.late == 0 and found.rounds == timing.MAX_ROUNDS


def test_without_the_sleep_the_launch_would_be_timed(stream, monkeypatch):
    monkeypatch.setattr(timing, "MAX_SLEEP", 0.0)
    found = times(stream, short=lambda: stream.queue(10e-6, host=150e-6))["short"]
    assert found.median > 0.05 and found.late == found.rounds


def test_a_function_that_waits_for_the_gpu_itself_is_named_as_late(stream):
    def waits() -> None:
        stream.queue(10e-6)
        stream.wait()

    found = times(stream, waits=waits, long=lambda: stream.queue(5e-3))
    assert found["waits"].late == found["waits"].rounds
    assert found["long"].median == pytest.approx(5.0) and found["long"].late == 0


def test_rounds_in_which_the_host_was_late_do_not_count_where_they_are_few():
    assert timing.timing([1.0, 9.0, 1.0], [False, True, False]) == timing.Timing(1.0, 1.0, 1.0, 3, 1)
    assert timing.timing([9.0, 9.0, 1.0], [True, True, False]).median == 9.0


def test_a_peer_that_loops_over_the_batch_is_marked(monkeypatch):
    (loop,) = LOOPS
    peers = {loop: lambda q, k, v: q, "torch": lambda q, k, v: q}
    monkeypatch.setattr("benchmarks.attention.peers", lambda machine, causal: peers)
    monkeypatch.setattr("benchmarks.attention.DRY_RUN", (2, 32, 2))
    (row,) = compare(Machine(dry_run=True), {"ours": lambda q, k, v: q}, 16, True, 32)
    assert row["batch"] == 2 and row["a call for each sequence"] == loop
    monkeypatch.setattr("benchmarks.attention.DRY_RUN", (1, 32, 2))
    (row,) = compare(Machine(dry_run=True), {"ours": lambda q, k, v: q}, 16, True, 32)
    assert "a call for each sequence" not in row


def test_a_peer_that_fails_keeps_its_reason_and_ours_raises():
    made = {"ours": lambda: lambda: 1, "peer": lambda: lambda: 1 / 0}
    calls, unable = able(Machine(dry_run=True), "a case", made, {"ours": lambda q, k, v: q})
    assert calls.keys() == {"ours"} and unable == {"peer": "ZeroDivisionError: division by zero"}
    with pytest.raises(ZeroDivisionError):
        able(Machine(dry_run=True), "a case", made, {"peer": lambda q, k, v: q})


def test_time_is_what_the_host_reads_on_a_cpu():
    assert timing.on_cpu({"a": lambda: time.sleep(0.01)})["a"].median >= 10


def test_an_element_that_a_kernel_leaves_out_is_nan_in_a_check():
    with memory_full_of_nan():
        assert torch.empty(3, dtype=torch.float16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()

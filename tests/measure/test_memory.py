"""Memory is counted to the byte: what stays, what was only there for a while, and the largest single buffer."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from minillm.attention import flash_attention, naive_attention
from minillm.measure import format_bytes, measure_memory, memory
from minillm.measure.memory import _account, _history_events

KIB, MIB = 2**10, 2**20


def floats(nbytes):
    """A new fp32 tensor of this many bytes."""
    return torch.empty(nbytes // 4)


@pytest.mark.parametrize(("seqlen", "mebibytes"), [(256, 4), (512, 16), (1024, 64), (2048, 256)])
def test_largest_buffer_of_naive_scores_is_heads_times_n_squared(seqlen, mebibytes):
    query, key = torch.zeros(2, 1, 16, seqlen, 64)
    report = measure_memory(lambda query, key: query @ key.transpose(-1, -2), query, key)
    assert report.largest_bytes == 16 * seqlen * seqlen * 4 == mebibytes * MIB
    assert report.peak_bytes == report.kept_bytes == report.largest_bytes


def test_naive_attention_peaks_at_two_score_matrices_and_keeps_only_the_output():
    def naive(query, key, value):
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    report = measure_memory(naive, *torch.randn(3, 1, 16, 256, 64))
    assert report.peak_bytes == 8 * MIB  # the scores, and the softmax of them
    assert report.largest_bytes == 4 * MIB
    assert report.kept_bytes == 1 * MIB
    assert report.temporary_bytes == 7 * MIB


def test_scratch_inside_a_fused_operator_is_seen():
    report = measure_memory(scaled_dot_product_attention, *torch.randn(3, 1, 16, 256, 64))
    assert report.kept_bytes >= 1 * MIB  # the output, 1 MiB
    assert report.peak_bytes > report.kept_bytes
    assert report.largest_bytes < 4 * MIB  # no score matrix


def test_a_freed_temporary_lowers_the_live_count_but_not_the_peak():
    def function():
        first = floats(3 * MIB)
        del first
        return floats(1 * MIB)

    report = measure_memory(function)
    assert report.peak_bytes == 3 * MIB
    assert report.kept_bytes == 1 * MIB
    assert report.allocations == 2


def test_two_temporaries_that_live_together_add_up():
    def function():
        first, second = floats(3 * MIB), floats(2 * MIB)
        return first.numel() + second.numel()

    report = measure_memory(function)
    assert report.peak_bytes == 5 * MIB
    assert report.largest_bytes == 3 * MIB
    assert report.kept_bytes == 0


def test_an_in_place_operation_allocates_nothing():
    older = torch.zeros(1000)
    report = measure_memory(lambda: older.add_(older).relu_())
    assert (report.peak_bytes, report.allocations) == (0, 0)


def test_a_view_allocates_nothing():
    older = torch.zeros(10, 100)
    report = measure_memory(lambda: older.transpose(0, 1).unsqueeze(0)[:, 5:].expand(4, -1, -1))
    assert (report.peak_bytes, report.allocations) == (0, 0)


def test_a_view_keeps_the_whole_of_its_buffer():
    report = measure_memory(lambda: floats(1 * MIB)[:1])
    assert report.kept_bytes == 1 * MIB


def test_freeing_an_older_buffer_gives_no_credit():
    cache = [floats(2 * MIB)]

    def grow():
        cache[0] = torch.cat([cache[0], cache[0]])

    report = measure_memory(grow)
    assert report.peak_bytes == report.kept_bytes == 4 * MIB


def test_what_autograd_saves_for_the_backward_is_kept():
    weight = torch.ones(1000, requires_grad=True)
    with_graph = measure_memory(lambda: weight.exp().exp().sum())
    without = measure_memory(lambda: weight.detach().exp().exp().sum())
    assert with_graph.kept_bytes == 2 * 4000 + 4
    assert without.kept_bytes == 4


def test_a_backward_is_counted_too():
    weight = torch.ones(1000, requires_grad=True)
    report = measure_memory(lambda: weight.exp().sum().backward())
    assert report.kept_bytes == 4000  # the gradient
    assert report.peak_bytes >= 2 * 4000


def test_the_result_is_handed_back_and_arguments_reach_the_function():
    report = measure_memory(torch.full, (2, 3), fill_value=7.0)
    assert torch.equal(report.result, torch.full((2, 3), 7.0))


def test_measuring_twice_gives_the_same_report():
    inputs = torch.randn(3, 1, 4, 100, 32)
    first, *others = [measure_memory(scaled_dot_product_attention, *inputs) for _ in range(5)]
    assert first.allocations > 0
    assert all(other == first for other in others)


@pytest.mark.parametrize("calls", [1, 2, 9])
def test_a_recording_that_is_emptied_on_the_way_loses_nothing(calls):
    def loop(emptied):
        kept = [floats(i * KIB) for i in range(1, 40)]
        for i in range(0, 39, 3):
            kept[i] = kept[i] * 2 + kept[(i + 5) % 39][:1]
            if emptied and i % calls == 0:
                memory.empty_recordings()
        return kept[::2]

    assert measure_memory(loop, True) == measure_memory(loop, False)


def test_no_garbage_is_collected_while_a_recording_is_emptied(monkeypatch):
    stop = memory._CpuRecorder.stop

    def collects_when_it_may(recorder):
        events = stop(recorder)
        if gc.isenabled():
            gc.collect()
        return events

    def cycle():
        a = [floats(KIB)]
        a.append(a)
        del a
        memory.empty_recordings()
        gc.collect()
        return floats(4)

    monkeypatch.setattr(memory._CpuRecorder, "stop", collects_when_it_may)
    assert measure_memory(cycle).kept_bytes == 4


def test_a_compiled_function_is_measured_as_it_is_compiled_already():
    graphs = []
    compiled = torch.compile(lambda x: x * 3 + 1, backend=lambda graph, _: graphs.append(graph) or graph)
    x = floats(KIB)
    compiled(x)
    first, second = (measure_memory(compiled, x) for _ in range(2))
    assert len(graphs) == 1 and first == second


def test_a_nested_measurement_counts_its_own_and_is_counted_outside():
    inner = []

    def outer():
        before = floats(1 * MIB)
        inner.append(measure_memory(floats, 2 * MIB))
        del before
        return floats(512 * KIB)

    report = measure_memory(outer)
    assert inner[0].peak_bytes == 2 * MIB
    assert report.peak_bytes == 3 * MIB
    assert report.kept_bytes == 512 * KIB + 2 * MIB  # the inner report holds its result
    assert report.allocations == 3


def test_an_exception_passes_through_and_leaves_the_next_measurement_right():
    def fails():
        floats(1 * MIB)
        raise KeyError("ours")

    def survives():
        with pytest.raises(KeyError, match="ours"):
            measure_memory(fails)
        return floats(2 * MIB)

    assert measure_memory(survives).largest_bytes == 2 * MIB
    assert not torch.autograd._profiler_enabled()
    assert measure_memory(floats, 4 * KIB).peak_bytes == 4 * KIB


def test_nothing_is_written_to_the_terminal():
    # In a process of its own: the profiler's and the allocator's complaints come once, at their first chance.
    code = """
import torch
from minillm.attention import flash_attention, naive_attention
from minillm.measure import measure_memory
cache = [torch.ones(8)]
def grow():
    cache[0] = torch.cat([cache[0], cache[0]])
print(measure_memory(grow).kept_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("64\n", "")


def test_the_functions_own_words_still_reach_the_terminal(capfd):
    measure_memory(lambda: os.write(2, b"mine"))
    assert capfd.readouterr().err == "mine"


def test_under_another_profile_the_refusal_says_why():
    with torch.autograd.profiler.profile(), pytest.raises(RuntimeError, match="profile is already running"):
        measure_memory(floats, 4)
    assert measure_memory(floats, 4).peak_bytes == 4


def test_what_cannot_be_measured_is_named():
    with pytest.raises(TypeError, match="function is Tensor"):
        measure_memory(torch.zeros(1))
    with pytest.raises(ValueError, match="device is 'meta'"):
        measure_memory(floats, 4, device="meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="no CUDA device"):
        measure_memory(floats, 4, device="cuda")


def test_an_address_that_is_used_again_is_a_new_buffer():
    events = [(1, 100), (1, -100), (1, 60), (2, 50), (9, -500), (2, -50)]
    assert _account(events) == (110, 100, 100, 60, 3)


def test_of_a_cuda_history_only_buffers_handed_out_and_given_back_count():
    history = [
        {"action": "segment_alloc", "addr": 0, "size": 2 * MIB},
        {"action": "alloc", "addr": 0, "size": 1000},
        {"action": "alloc", "addr": 1024, "size": 24},
        {"action": "free_requested", "addr": 0, "size": 1000},
        {"action": "free_completed", "addr": 0, "size": 1000},
        {"action": "snapshot", "addr": 0, "size": 0},
    ]
    assert _history_events(history) == [(0, 1000), (1024, 24), (0, -1000)]
    assert _account(_history_events(history)) == (1024, 1000, 1000, 24, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not verified here: the CUDA counts need a GPU")
class TestOnCuda:
    """The CUDA half: the same table, and the peak against the allocator's own statistics."""

    @pytest.mark.parametrize(("seqlen", "mebibytes"), [(256, 4), (1024, 64)])
    def test_largest_buffer_of_naive_scores_is_the_same_as_on_the_cpu(self, seqlen, mebibytes):
        query, key = torch.zeros(2, 1, 16, seqlen, 64, device="cuda")
        query @ key.transpose(-1, -2)  # cuBLAS's workspace
        report = measure_memory(lambda query, key: query @ key.transpose(-1, -2), query, key)
        assert report.device.startswith("cuda")
        assert report.largest_bytes == report.kept_bytes == mebibytes * MIB

    def test_the_peak_is_the_allocators_own(self):
        def function():
            first = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
            del first
            return torch.empty(MIB, dtype=torch.uint8, device="cuda")

        torch.cuda.empty_cache()  # or the allocator may hand out a cached block that is larger than was asked for
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        report = measure_memory(function, device="cuda")
        assert report.peak_bytes == torch.cuda.max_memory_allocated() - before == 3 * MIB
        assert report.kept_bytes == torch.cuda.memory_allocated() - before == MIB

    def test_nested_measurements_count_as_on_the_cpu(self):
        def outer():
            before = torch.empty(MIB, dtype=torch.uint8, device="cuda")
            inner = measure_memory(lambda: torch.empty(2 * MIB, dtype=torch.uint8, device="cuda"), device="cuda")
            return before.numel(), inner

        report = measure_memory(outer, device="cuda")
        assert report.peak_bytes == 3 * MIB
        assert report.result[1].peak_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1024, "1 KiB"),
        (82432, "80.5 KiB"),
        (4 * MIB, "4 MiB"),
        (-MIB, "-1 MiB"),
        (2**40, "1 TiB"),
        (2**51, "2048 TiB"),
    ],
)
def test_sizes_are_written_in_binary_units(size, text):
    assert format_bytes(size) == text


def test_a_report_reads_as_a_sentence():
    assert str(measure_memory(floats, 4 * MIB)) == (
        "peak 4 MiB on cpu in 1 buffers, the largest 4 MiB; the result keeps 4 MiB"
    )


@pytest.mark.parametrize("seqlen", [256, 512, 1024, 2048])
def test_the_score_buffer_of_the_tiled_attention_is_one_mib_at_any_length(seqlen):
    q, k, v = torch.randn(3, 1, seqlen, 16, 64)
    naive = measure_memory(naive_attention, q, k, v)
    tiled = measure_memory(flash_attention, q, k, v)
    assert naive.largest_temporary_bytes == 16 * seqlen**2 * 4
    assert tiled.largest_temporary_bytes == 16 * 128 * 128 * 4
    assert tiled.temporary_bytes < 8 * MIB

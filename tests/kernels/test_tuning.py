"""The choice of tiles: few candidates, all of them fit, and the choice can be read."""

import itertools

import pytest
import torch

from kernels import tuning
from kernels.flash_attention import flash_attention
from kernels.flash_attention.descriptors import using_descriptors
from kernels.runtime import TritonMode
from kernels.targets import TARGETS
from kernels.tuning import INTERPRETER, KERNELS, Config, Kind, candidates, choice, chosen, length_class, tune, using

HALF = torch.bfloat16
KIND = Kind(64, HALF)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_one_to_three_candidates_that_fit_its_shared_memory(target):
    for kernel, headdim, dtype in itertools.product(KERNELS, (16, 64, 96, 128, 192, 256), (HALF, torch.float32)):
        found = candidates(kernel, headdim, dtype, target)
        assert 1 <= len(found) <= 3, (kernel, headdim, dtype)
        found += candidates(kernel, headdim, dtype, target, ragged=True)
        if TARGETS[target].capability >= (9, 0):
            found += candidates(kernel, headdim, dtype, target, tma=True)
        needed = [config.shared_bytes(kernel, headdim, dtype.itemsize) for config in found]
        assert max(needed) <= TARGETS[target].shared_kib * 1024


def test_less_shared_memory_leaves_fewer_candidates():
    assert len(candidates("forward", 128, HALF, "sm_86")) < len(candidates("forward", 128, HALF, "sm_80"))


@pytest.mark.skipif(tuning.MODE.name != "interpreter", reason="not in the interpreter: its choice was not checked")
def test_the_interpreter_has_one_configuration_and_times_nothing():
    assert choice("forward", KIND) == INTERPRETER
    assert tune("forward", 64, HALF, lambda: pytest.fail("timed a call in the interpreter")) == INTERPRETER


def test_a_choice_holds_for_a_block_and_can_be_read():
    with using("forward", 64, HALF, Config(32, 16, 4, 2)):
        assert choice("forward", KIND) == (32, 16, 4, 2)
        assert chosen(64, HALF)["forward"] == "32 × 16 tiles, 4 warps, 2 stages"
        with using("forward", 64, HALF, Config(16, 16, 4, 1)):
            assert choice("forward", KIND).block_q == 16
        assert choice("forward", KIND).block_q == 32
    assert not tuning._in_use


def test_tiles_are_tuned_for_a_kind_of_call_and_hold_for_no_other(monkeypatch):
    """`tune` on a GPU that is played: the time of a candidate is its number of keys in a tile."""
    play_hopper(monkeypatch, lambda kind: float(choice("forward", kind).block_k))
    kind = Kind(128, HALF, causal=True, length="short", tma=True)
    first = candidates("forward", 128, HALF, "sm_90", tma=True)[0]
    fastest = tune("forward", 128, HALF, lambda: choice("forward", kind))
    assert fastest.block_k == 64 and choice("forward", kind) == fastest != first
    for change in (dict(causal=False), dict(length="medium"), dict(dtype=torch.float16), dict(ragged=True)):
        assert choice("forward", kind._replace(**change)) == first, change
    text = chosen(128, HALF, causal=True, length="short", tma=True)["forward"]
    assert text == "128 × 64 tiles, 8 warps, 4 stages, descriptors"
    assert choice("forward", kind._replace(tma=False)) == candidates("forward", 128, HALF, "sm_90")[0]


def play_hopper(monkeypatch, milliseconds):
    monkeypatch.setattr(tuning, "MODE", TritonMode("gpu", "played"))
    monkeypatch.setattr(tuning, "this_gpu", lambda: "sm_90")
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: (run(), milliseconds(tuning._asked["forward"]))[1])


def test_a_candidate_that_fails_costs_that_candidate(monkeypatch):
    kind = Kind(128, HALF)
    found = candidates("forward", 128, HALF, "sm_90")

    def milliseconds(kind):
        if choice("forward", kind) == found[-1]:
            raise RuntimeError("out of resources")
        return 1.0 if choice("forward", kind) == found[0] else 0.5

    play_hopper(monkeypatch, milliseconds)
    assert tune("forward", 128, HALF, lambda: choice("forward", kind)) == found[1]
    play_hopper(monkeypatch, lambda kind: 1 / 0)
    with pytest.raises(RuntimeError, match="forward with Config.* fails: .*division by zero"):
        tune("forward", 128, HALF, lambda: choice("forward", kind))
    with pytest.raises(ValueError, match="run does not use backward_q with headdim 128"):
        tune("backward_q", 128, HALF, lambda: None)


@pytest.mark.parametrize("lengths, name", {(1, 1024): "short", (4096, 1): "medium", (1, 4097): "long"}.items())
def test_the_longer_of_queries_and_keys_says_how_long_a_call_is(lengths, name):
    assert length_class(*lengths) == name


def test_a_call_asks_for_the_tiles_of_its_kind():
    q, k = torch.zeros(1, 3, 2, 16, dtype=torch.float16), torch.zeros(1, 1100, 2, 16, dtype=torch.float16)
    device = "cuda" if tuning.MODE.name == "gpu" else "cpu"
    with using_descriptors(), using("forward", 16, torch.float16, Config(16, 128, 4, 1)):
        flash_attention(q.to(device), k.to(device), k.to(device), causal=True, window_size=(9, 0))
    asked = Kind(16, torch.float16, causal=True, window=True, ragged=False, length="medium", tma=True)
    assert tuning._asked["forward"] == asked

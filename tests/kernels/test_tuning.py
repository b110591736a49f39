"""The choice of tiles: few candidates, all of them fit, and the choice can be read."""

import itertools

import pytest
import torch

from kernels import tuning
from kernels.targets import TARGETS
from kernels.tuning import INTERPRETER, KERNELS, Config, Kind, candidates, choice, chosen, tune, using

HALF = torch.bfloat16
KIND = Kind(64, HALF)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_one_to_three_candidates_that_fit_its_shared_memory(target):
    for kernel, headdim, dtype in itertools.product(KERNELS, (16, 64, 96, 128, 192, 256), (HALF, torch.float32)):
        found = candidates(kernel, headdim, dtype, target)
        assert 1 <= len(found) <= 3, (kernel, headdim, dtype)
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

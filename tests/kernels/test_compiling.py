"""What the compiler makes of the kernels, for GPUs that are not here. The results are kept: a second run is quick."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
import triton

from kernels import tuning
from kernels.compiling import Compiled, Job, compile_kernels
from kernels.compiling.compile import _sources
from kernels.flash_attention.jobs import flash_attention_jobs
from kernels.targets import TARGETS, target_of

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("sm_80", "sm_90", "sm_100")  # the other targets: make compile-table


def shipped(target, **call):
    jobs = flash_attention_jobs(target, **call)
    return [
        (name, job, compiled)
        for (name, job), compiled in zip(jobs.items(), compile_kernels(jobs.values()), strict=True)
    ]


PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def assert_no_spill(name, compiled):
    """The register count depends on the compiler: with another Triton than the pinned one a spill is only a warning."""
    if triton.__version__ == PINNED:
        assert compiled.spilled_bytes == 0, f"{name}: {compiled.spilled_bytes} bytes spilled"
    elif compiled.spilled_bytes:
        warnings.warn(f"Triton {triton.__version__} spills {compiled.spilled_bytes} bytes in {name}", stacklevel=2)


# No wgmma tile holds dK and dV of 256 columns in registers: this one kernel multiplies with mma.sync on Hopper.
EXCEPTIONS = {("sm_90", "backward_kv d=256 32×32 8w 2s"): "mma.sync"}


@pytest.mark.parametrize("target", COMPILED)
def test_shipped_kernels_use_the_tensor_cores_and_spill_nothing(target):
    for name, job, compiled in shipped(target):
        assert not compiled.failure
        assert list(compiled.instructions) == [EXCEPTIONS.get((target, name), TARGETS[target].instruction)], name
        assert_no_spill(name, compiled)
        assert 0 < compiled.registers <= 255 and compiled.async_copies > 0 and compiled.occupancy(job) > 0


# What asks for more registers than a plain causal call: heads that share keys, sequences that are looked up, dimensions
# that are padded, a window's left end. (`make compile-table` has more of them; each takes two seconds to compile.)
HARD_CALLS = {
    "GQA, ragged": dict(group=4, ragged=True, headdims=(128,)),
    "GQA, ragged, padded dimensions, fp16": dict(group=4, ragged=True, headdims=(96,), dtype=torch.float16),
    "window": dict(window=True, causal=False, headdims=(128,)),
}


@pytest.mark.parametrize("call", HARD_CALLS)
@pytest.mark.parametrize("target", COMPILED)
def test_no_kind_of_call_in_half_precision_spills(target, call):
    for name, _, compiled in shipped(target, **HARD_CALLS[call]):
        assert not compiled.failure and compiled.instructions, name
        assert_no_spill(f"{name}, {call}, {target}", compiled)


# The forward with descriptors, causal, on sm_90: by headdim the registers that it needed when it was written.
FEW_REGISTERS = {64: 185, 128: 204, 256: 232}


def test_the_forward_on_hopper_copies_by_descriptors_and_needs_fewer_registers_than_by_pointers():
    described = [found for found in shipped("sm_90") if found[0].startswith("forward")]
    pointed = {job.constants["HEADDIM"]: compiled for _, job, compiled in shipped("sm_90", pointers=True)[:3]}
    for name, job, compiled in described:
        headdim = job.constants["HEADDIM"]
        assert name.endswith(" tma") and list(compiled.instructions) == ["wgmma"]
        assert compiled.hopper["cp.async.bulk.tensor"] == compiled.async_copies > 0
        assert not pointed[headdim].hopper["cp.async.bulk.tensor"] and pointed[headdim].async_copies > 0
        assert_no_spill(f"forward by pointers, d={headdim}", pointed[headdim])
        if triton.__version__ == PINNED:
            assert compiled.registers <= FEW_REGISTERS[headdim], name
            assert compiled.registers < pointed[headdim].registers or headdim == 256  # twice as many keys in a tile
    # A wait for all copies at the top of the loop would leave them one product to overlap with. At 256 a third stage
    # spills.
    assert pointed[64].in_flight >= 2 and pointed[128].in_flight >= 2


@pytest.mark.parametrize("call", [dict(ragged=True, group=4), dict(causal=False, window=True)], ids=str)
def test_a_wide_forward_with_descriptors_spills_in_no_kind_of_call(call):
    jobs = [job for name, job in flash_attention_jobs("sm_90", headdims=(256,), **call).items() if " tma" in name]
    for job, compiled in zip(jobs, compile_kernels(jobs), strict=True):
        assert compiled.hopper["cp.async.bulk.tensor"] > 0
        assert_no_spill(f"{job}, {call}", compiled)


def test_fp16_without_a_mask_spills_nothing_either():
    for name, _, compiled in shipped("sm_90", dtype=torch.float16, causal=False, headdims=(128,)):
        assert compiled.instructions and ".f16" in compiled.example
        assert_no_spill(name, compiled)


def test_fp32_spills_nothing_and_is_compiled_in_seconds():
    for name, _, compiled in shipped("sm_90", dtype=torch.float32, headdims=(128,)):
        assert not compiled.failure and not compiled.instructions, name  # "ieee": no tensor cores
        assert_no_spill(name, compiled)


@pytest.mark.parametrize("target", COMPILED)
def test_the_estimate_by_which_tuning_prunes_is_an_upper_bound(target):
    for name, job, compiled in shipped(target):
        sizes = (job.constants["BLOCK_Q"], job.constants["BLOCK_K"], job.warps, job.stages)
        estimate = tuning.Config(*sizes).shared_bytes(name.split()[0], job.constants["HEADDIM"], itemsize=2)
        assert compiled.shared_bytes <= estimate <= TARGETS[target].shared_kib * 1024, name


def one_job(**changes) -> Job:
    job = next(iter(flash_attention_jobs("sm_90", headdims=(64,), pointers=True).values()))
    return dataclasses.replace(job, **changes)


def test_a_result_is_kept_and_a_changed_job_is_another_one(tmp_path):
    (first,) = compile_kernels([one_job()], tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace(f'"registers": {first.registers}', '"registers": 7'))
    assert compile_kernels([one_job()], tmp_path)[0].registers == 7
    assert compile_kernels([one_job(warps=4)], tmp_path)[0].registers != 7


def test_a_change_of_a_module_that_the_kernel_imports_is_another_compilation():
    names = {path.relative_to(ROOT / "kernels").as_posix() for path in _sources("kernels.flash_attention.forward")}
    assert {"flash_attention/forward.py", "tiles.py", "runtime.py", "targets.py"} <= names


def test_what_a_target_cannot_take_is_named():
    (compiled,) = compile_kernels([one_job(target="sm_86", stages=5)])
    assert "128 × 128 with 8 warps and 5 stages for sm_86 needs 144 KiB of shared memory" in compiled.failure
    assert "a program has 99 there: fewer stages, smaller blocks" in compiled.failure
    (compiled,) = compile_kernels([one_job(warps=3)])
    assert "with 3 warps" in compiled.failure and "does not compile" in compiled.failure
    with pytest.raises(ValueError, match="sm_75 is not supported: it has no tensor-core instruction"):
        compile_kernels([one_job(target="sm_75")])
    with pytest.raises(ValueError, match="target is 'hopper', wants one of sm_80"):
        compile_kernels([one_job(target="hopper")])


def test_occupancy_is_limited_by_what_runs_out_first():
    job = one_job(warps=4)  # 128 threads
    assert Compiled(registers=128, shared_bytes=0).occupancy(job) == 4 * 4 / 64  # 65536 / (128 · 128): 4 programs
    assert Compiled(registers=32, shared_bytes=100 * 1024).occupancy(job) == 2 * 4 / 64
    assert Compiled(registers=16, shared_bytes=0).occupancy(job) == 1.0


NEAREST = {(8, 0): "sm_80", (8, 7): "sm_86", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}


@pytest.mark.parametrize("capability, target", NEAREST.items())
def test_a_gpu_gets_its_own_target_or_the_nearest_older_one(capability, target):
    assert target_of(capability) == target


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (11, 0)])
def test_a_gpu_of_an_unknown_or_too_old_kind_is_refused(capability):
    with pytest.raises(ValueError, match="sm_{}{} is not supported".format(*capability)):
        target_of(capability)

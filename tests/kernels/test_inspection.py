"""What the compiler makes of the kernels, for GPUs that are not here. The reports are kept: a second run is quick."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
import triton

from kernels import matrix, tuning
from kernels.inspection import Job, Report, inspect
from kernels.targets import TARGETS, target_of

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ("sm_80", "sm_90", "sm_100")  # the other targets: make compile-matrix


def shipped(target, **call):
    jobs = matrix.flash_attention(target, **call)
    return [(name, job, report) for (name, job), report in zip(jobs.items(), inspect(jobs.values()), strict=True)]


PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def assert_no_spill(name, report):
    """How many registers are needed is the compiler's affair: another Triton's few bytes are told, and no failure."""
    if triton.__version__ == PINNED:
        assert report.spilled_bytes == 0, f"{name}: {report.spilled_bytes} bytes spilled"
    elif report.spilled_bytes:
        warnings.warn(f"Triton {triton.__version__} spills {report.spilled_bytes} bytes in {name}", stacklevel=2)


# No wgmma tile holds dK and dV of 256 columns in registers: this one kernel multiplies with mma.sync on Hopper.
EXCEPTIONS = {("sm_90", "backward_kv d=256 32×32 8w 2s"): "mma.sync"}


@pytest.mark.parametrize("target", COMPILED)
def test_shipped_kernels_use_the_tensor_cores_and_spill_nothing(target):
    for name, job, report in shipped(target):
        assert not report.failure
        assert list(report.instructions) == [EXCEPTIONS.get((target, name), TARGETS[target].instruction)], name
        assert_no_spill(name, report)
        assert 0 < report.registers <= 255 and report.async_copies > 0 and report.occupancy(job) > 0


# What asks for more registers than a plain causal call: heads that share keys, sequences that are looked up, dimensions
# that are padded, a window's left end. (`make compile-matrix` has more of them; each takes two seconds to compile.)
HARD_CALLS = {
    "GQA, ragged": dict(group=4, ragged=True, headdims=(128,)),
    "GQA, ragged, padded dimensions, fp16": dict(group=4, ragged=True, headdims=(96,), dtype=torch.float16),
    "window": dict(window=True, causal=False, headdims=(128,)),
}


@pytest.mark.parametrize("call", HARD_CALLS)
@pytest.mark.parametrize("target", COMPILED)
def test_no_kind_of_call_in_half_precision_spills(target, call):
    for name, _, report in shipped(target, **HARD_CALLS[call]):
        assert not report.failure and report.instructions, name
        assert_no_spill(f"{name}, {call}, {target}", report)


def test_fp16_without_a_mask_spills_nothing_either():
    for name, _, report in shipped("sm_90", dtype=torch.float16, causal=False, headdims=(128,)):
        assert report.instructions and ".f16" in report.example
        assert_no_spill(name, report)


def test_fp32_spills_nothing_and_is_compiled_in_seconds():
    for name, _, report in shipped("sm_90", dtype=torch.float32, headdims=(128,)):
        assert not report.failure and not report.instructions, name  # "ieee": no tensor cores
        assert_no_spill(name, report)


@pytest.mark.parametrize("target", COMPILED)
def test_the_estimate_by_which_tuning_prunes_is_an_upper_bound(target):
    for name, job, report in shipped(target):
        sizes = (job.constants["BLOCK_Q"], job.constants["BLOCK_K"], job.warps, job.stages)
        estimate = tuning.Config(*sizes).shared_bytes(name.split()[0], job.constants["HEADDIM"], itemsize=2)
        assert report.shared_bytes <= estimate <= TARGETS[target].shared_kib * 1024, name


def one_job(**changes) -> Job:
    job = next(iter(matrix.flash_attention("sm_90", headdims=(64,)).values()))
    return dataclasses.replace(job, **changes)


def test_a_report_is_kept_and_a_changed_job_is_another_one(tmp_path):
    (first,) = inspect([one_job()], tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace(f'"registers": {first.registers}', '"registers": 7'))
    assert inspect([one_job()], tmp_path)[0].registers == 7
    assert inspect([one_job(warps=4)], tmp_path)[0].registers != 7


def test_what_a_target_cannot_take_is_named():
    (report,) = inspect([one_job(target="sm_86", stages=5)])
    assert "128 × 128 with 8 warps and 5 stages for sm_86 needs 144 KiB of shared memory" in report.failure
    assert "a program has 99 there: fewer stages, smaller blocks" in report.failure
    (report,) = inspect([one_job(warps=3)])
    assert "with 3 warps" in report.failure and "does not compile" in report.failure
    with pytest.raises(ValueError, match="sm_75 is not supported: it has no tensor-core instruction"):
        inspect([one_job(target="sm_75")])
    with pytest.raises(ValueError, match="target is 'hopper', wants one of sm_80"):
        inspect([one_job(target="hopper")])


def test_occupancy_is_limited_by_what_runs_out_first():
    job = one_job(warps=4)  # 128 threads
    assert Report(registers=128, shared_bytes=0).occupancy(job) == 4 * 4 / 64  # 65536 / (128 · 128): 4 programs
    assert Report(registers=32, shared_bytes=100 * 1024).occupancy(job) == 2 * 4 / 64
    assert Report(registers=16, shared_bytes=0).occupancy(job) == 1.0


NEAREST = {(8, 0): "sm_80", (8, 7): "sm_86", (9, 0): "sm_90", (10, 3): "sm_100", (12, 1): "sm_120"}


@pytest.mark.parametrize("capability, target", NEAREST.items())
def test_a_gpu_gets_its_own_target_or_the_nearest_older_one(capability, target):
    assert target_of(capability) == target


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (11, 0)])
def test_a_gpu_of_an_unknown_or_too_old_kind_is_refused(capability):
    with pytest.raises(ValueError, match="sm_{}{} is not supported".format(*capability)):
        target_of(capability)

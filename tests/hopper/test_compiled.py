"""Every rung compiles to sm_90a with the instructions that its idea needs; docs/hopper.md shows what came out."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from kernels.compiling import compile_kernels
from kernels.hopper.__main__ import measured, show_attention, table
from kernels.hopper.jobs import job_of, rung_jobs
from kernels.hopper.launch import HEADDIMS, RUNGS, launch_of
from tests.emulator import kernels

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "hopper.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rungs():
    """{(rung, headdim, type): report}, causal in bf16; full, in fp16, at the smaller of the two."""
    jobs = {
        (rung, headdim, dtype): job
        for dtype, causal in ((torch.bfloat16, True), (torch.float16, False))
        for (rung, headdim), job in rung_jobs(dtype, causal).items()
        if causal or headdim == HEADDIMS[0]
    }
    return dict(zip(jobs, compile_kernels(jobs.values()), strict=True))


def test_every_rung_compiles_in_both_headdims_and_types(rungs):
    assert len(rungs) == len(RUNGS) * (len(HEADDIMS) + 1)
    assert not [report.failure for report in rungs.values() if report.failure]


def test_every_rung_multiplies_on_the_tensor_cores_and_copies_by_the_copy_engine(rungs):
    for (rung, headdim, _), report in rungs.items():
        # One instruction multiplies along 16: d/16 for the scores, 128/16 for the output.
        assert report.hopper["wgmma.mma_async"] == headdim // 16 + 128 // 16, rung
        # q, k, v in, o out; rung 2 asks for k and v in two places, before the loop and in it.
        assert report.hopper["cp.async.bulk.tensor"] >= (6 if rung == "pipelined" else 4), rung


def test_each_rung_waits_where_its_idea_waits(rungs):
    waits = {rung: rungs[rung, 128, torch.bfloat16].hopper["mbarrier.try_wait"] for rung in RUNGS}
    assert waits["tma_wgmma"] == 3  # q, k, v: a wait behind each copy
    assert waits["specialized"] == 5  # q, k, v by the consumers; a free slot of k and of v by the producer
    assert waits["pipelined"] in (3, 4)  # q, k, v: from triton 3.7 on, one of them stands there twice


def test_the_producer_keeps_24_registers_and_the_consumers_get_240(rungs):
    for (rung, *_), report in rungs.items():
        assert (report.hopper["setmaxnreg"] > 0) == (rung == "specialized")
        assert report.registers_set == ([24, 240] if rung == "specialized" else [])


def test_nothing_spills_and_all_fits_into_a_block(rungs):
    for report in rungs.values():
        assert report.spilled_bytes == 0
        assert 0 < report.registers <= 255 and report.shared_bytes <= 227 * 1024


def test_a_single_query_and_an_odd_length_compile_too():
    """Triton makes a constant of an argument that is 1, and compiles anew for one that 16 does not divide."""
    jobs = []
    for rung, seqlen, kind in (("pipelined", 1, "1"), ("specialized", 203, "i32")):
        x = torch.empty(1, seqlen, 1, 64).half()
        launch = launch_of(x, x, x, x, torch.empty(1, 1, seqlen), causal=True)
        jobs.append(job_of(f"{RUNGS[rung].__name__}:forward", launch.arguments, launch.num_warps))
        assert jobs[-1].signature["seqlen_q"] == jobs[-1].signature["seqlen_k"] == kind
    assert not [report.failure for report in compile_kernels(jobs) if report.failure]


def test_the_kernels_that_are_not_attention_compile_to_what_they_are():
    a, b, x = torch.empty(128, 128).half(), torch.empty(64, 128).half(), torch.empty(32, 64).half()
    e4m3 = torch.float8_e4m3fn
    gemm_arguments = kernels.gemm(a, b, (128, 64, 64))[1]
    jobs = {
        "copy": job_of("tests.emulator.kernels:copy_kernel", kernels.copy(x, [32, 64])[1], 4),
        "double": job_of("tests.emulator.kernels:double_kernel", [x, x, 32, 64, 32, 64], 4),
        "example": job_of("kernels.emulator.example:double_kernel", [*kernels.rows(x, x), True], 4),
        "gemm": job_of("tests.emulator.kernels:gemm_kernel", gemm_arguments, 8),
        "e4m3": job_of("tests.emulator.kernels:gemm_kernel", kernels.gemm(a.to(e4m3), b.to(e4m3), (128, 64, 64))[1], 8),
        "specialized": job_of("tests.emulator.kernels:specialized_gemm_kernel", gemm_arguments, 8),
    }
    reports = dict(zip(jobs, compile_kernels(jobs.values()), strict=True))
    assert not [report.failure for report in reports.values() if report.failure]
    counts = {name: report.hopper for name, report in reports.items()}
    for name in ("copy", "double", "example"):
        assert counts[name]["cp.async.bulk.tensor"] == 2 and counts[name]["wgmma.mma_async"] == 0, name
    assert counts["gemm"]["wgmma.mma_async"] == 4 and counts["e4m3"]["wgmma.mma_async"] == 2  # 64/16, 64/32
    assert reports["specialized"].registers_set == [24, 240]


def test_the_module_runs_every_rung_in_the_emulator(capsys):
    show_attention()
    assert capsys.readouterr().out.count("largest difference from float64") == 3


def test_the_table_in_the_docs_is_what_compiles():
    made_with = re.search(r"triton (\d+\.\d+\.\d+)", DOCS).group(1)
    if version("triton") != made_with:
        pytest.skip(f"the table is of triton {made_with}: the counts of {version('triton')} were not compared with it")
    printed = table()
    assert printed in DOCS, f"docs/hopper.md is stale; python -m kernels.hopper prints:\n{printed}"


def test_the_table_takes_speeds_from_the_stored_results(tmp_path):
    assert measured("pipelined", 64, tmp_path) == "not measured yet"
    rows = [
        {"headdim": headdim, "causal": causal, "seqlen": seqlen, "pipelined TFLOP/s": seqlen / 100}
        for headdim in HEADDIMS
        for causal in (False, True)
        for seqlen in (512, 16384)
    ]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "hopper.json").write_text(json.dumps({"machine": {"device": "NVIDIA H200"}, "rows": rows}))
    assert measured("pipelined", 64, tmp_path) == "164 (NVIDIA H200)"

"""Every rung compiles to sm_90a with the instructions that its idea needs; docs/hopper.md shows what came out."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.hopper.launch import HEADDIMS, RUNGS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = (ROOT / "docs" / "hopper.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.hopper.compile_all"]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def kernels(compiled):
    return compiled["kernels"]


def rungs(kernels):
    return {name: report for name, report in kernels.items() if name.split()[0] in RUNGS}


def test_every_rung_is_there_in_both_headdims_and_types(kernels):
    assert len(rungs(kernels)) == len(RUNGS) * len(HEADDIMS) * 2


def test_every_rung_multiplies_on_the_tensor_cores_and_copies_by_the_copy_engine(kernels):
    for name, report in rungs(kernels).items():
        headdim = int(name.split()[1])
        # One instruction multiplies along 16: d/16 for the scores, 128/16 for the output.
        assert report["instructions"]["wgmma.mma_async"] == headdim // 16 + 128 // 16, name
        assert report["instructions"]["cp.async.bulk.tensor"] >= 4, name  # q, k, v in; o out


def test_each_rung_waits_where_its_idea_waits(kernels):
    waits = {rung: kernels[f"{rung} 128 bfloat16 causal"]["instructions"]["mbarrier.try_wait"] for rung in RUNGS}
    assert waits["tma_wgmma"] == 3  # q, k, v: a wait behind each copy
    assert waits["specialized"] == 5  # q, k, v by the consumers; a free slot of k and of v by the producer
    assert waits["pipelined"] >= 3


def test_only_the_specialised_rung_hands_registers_over(kernels):
    for name, report in rungs(kernels).items():
        assert (report["instructions"]["setmaxnreg"] > 0) == name.startswith("specialized"), name


def test_the_producer_keeps_24_registers_and_the_consumers_get_240(kernels):
    for name, report in rungs(kernels).items():
        assert report["handed_over"] == ([24, 240] if name.startswith("specialized") else []), name


def test_nothing_spills_and_all_fits_into_a_block(kernels):
    for name, report in kernels.items():
        assert report["spilled"] == 0, name
        assert report["registers"] <= 255 and report["shared"] <= 227 * 1024, name


def test_the_kernels_that_are_not_attention_compile_to_what_they_are(kernels):
    counts = {name: report["instructions"] for name, report in kernels.items()}
    assert counts["copy"]["cp.async.bulk.tensor"] == 2 and counts["copy"]["wgmma.mma_async"] == 0
    assert counts["double"]["cp.async.bulk.tensor"] == counts["example"]["cp.async.bulk.tensor"] == 2
    assert counts["gemm"]["wgmma.mma_async"] == 4 and counts["gemm e4m3"]["wgmma.mma_async"] == 2  # 64/16, 64/32
    assert counts["specialized gemm"]["setmaxnreg"] > 0


def test_the_table_in_the_docs_is_what_compiles(compiled):
    version = re.search(r"triton (\d+\.\d+\.\d+)", DOCS).group(1)
    if importlib.metadata.version("triton") != version:
        pytest.skip(f"the table is of triton {version}: registers and counts of another version were not compared")
    assert compiled["table"] in DOCS, (
        f"run `python -m kernels.hopper` and put this into docs/hopper.md:\n{compiled['table']}"
    )

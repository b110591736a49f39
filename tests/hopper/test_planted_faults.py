"""Faults as people make them, planted in the rungs: the emulator must name each, with its buffer and its lines."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels.emulator import (
    BadBarrier,
    Deadlock,
    MissingFence,
    OutOfBounds,
    Race,
    Report,
    Unwritten,
    UseAfterFree,
    WrongArrivals,
    WrongBytes,
    launch,
)
from kernels.emulator.scheduler import Program
from kernels.hopper.launch import RUNGS, attention
from tests.attention.grid import random_qkv
from tests.hopper.planted import plant

QK = "scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), empty, use_acc=False)\n"
QK_ASYNC = QK.replace("use_acc=False", "use_acc=False, is_async=True")
PV = "acc = warpgroup_mma(gl.convert_layout(p.to(dtype), p_layout), v_tile, acc)\n"
PV_ASYNC = PV.replace("v_tile, acc)", "v_tile, acc, is_async=True)")
ARRIVE_K = "mbarrier.arrive(k_free.index(slot))\n"
ARRIVE_V = "mbarrier.arrive(v_free.index(slot))\n"
UNINITIALISED = "gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())"
MASK = "        scores = mask_scores"
EXPECT = "mbarrier.expect(ready.index(slot), desc.block_type.nbytes)"
WAIT = "warpgroup_mma_wait"
IMPORT = "tma, warpgroup_mma\n"


@dataclass(frozen=True)
class Fault:
    """A fault in a rung: the edits that plant it, the report that must come, and what it must name.

    Args:
        names: pieces of the report: the buffer or barrier, and the code of the operations that met.
        elsewhere: other symptoms of it that another order may report.
    """

    claim: str
    rung: str
    edits: tuple[tuple[str, str], ...]
    report: type[Report]
    names: tuple[str, ...]
    elsewhere: tuple[type[Report], ...] = ()

    def __str__(self) -> str:
        return self.claim.replace(" ", "-")


FAULTS = [
    Fault(
        "a missing wait for a copy",
        "pipelined",
        (("        mbarrier.wait(k_ready.index(slot), phase)\n", ""),),
        Race,
        ("on k_ring[0]", "TMA copy into k_ring[0]", "tma_load(desc", "scores = warpgroup_mma(", "completes k_ready[0]"),
    ),
    Fault(
        "a wait at the wrong phase",
        "specialized",
        (("mbarrier.wait(v_ready.index(slot), phase)", "mbarrier.wait(v_ready.index(slot), phase ^ 1)"),),
        Race,
        ("on v_ring[0]", "acc = warpgroup_mma(", "phase ^ 1)", "its parity is wrong"),
        (Deadlock, Unwritten),
    ),
    Fault(
        "a barrier that waits for an arrival too many",
        "specialized",
        (("k_free = allocate_barriers(STAGES, 1)", "k_free = allocate_barriers(STAGES, 2)"),),
        Deadlock,
        ("produce waits for k_free[0], phase 0", "consume waits for k_ready[0], phase 1", "with 1 of 2 arrivals"),
    ),
    Fault(
        "one arrival too many",
        "specialized",
        ((ARRIVE_V, f"{ARRIVE_V}        {ARRIVE_V}"),),
        WrongArrivals,
        ("v_free[0]", "mbarrier.arrive(v_free.index(slot))", "[consume]"),
    ),
    Fault(
        "a slot given back before it has been read",
        "specialized",
        ((f"        {ARRIVE_K}", ""), (QK, f"{ARRIVE_K}        {QK}")),
        Race,
        ("on k_ring[0]", "scores = warpgroup_mma(", "[consume]", "tma_load(desc", "[produce]"),
    ),
    Fault(
        "a slot refilled while the tensor cores still read it",
        "pipelined",
        (
            (IMPORT, f"tma, warpgroup_mma, {WAIT}\n"),
            (QK, QK_ASYNC),
            (MASK, f"        scores = {WAIT}(0, deps=(scores,))\n{MASK}"),
        ),
        Race,
        ("on k_ring[0]", "scores = warpgroup_mma(", "tma_load(desc", "may still be reading"),
    ),
    Fault(
        "a missing fence before the copy engine reads what threads wrote",
        "tma_wgmma",
        (("    fence_async_shared()  # threads wrote it, the copy engine reads it\n", ""),),
        MissingFence,
        ("on q_smem", "q_tile.store(out.to(dtype))", "tma_store(o_desc", "fence_async_shared() between"),
    ),
    Fault(
        "too few bytes expected",
        "pipelined",
        ((EXPECT, EXPECT.replace("nbytes", "nbytes // 2")),),
        WrongBytes,
        ("k_ready[0] got 8192 bytes more", "nbytes // 2)"),
    ),
    Fault(
        "too many bytes expected",
        "specialized",
        ((EXPECT, EXPECT.replace("nbytes", "nbytes * 2")),),
        WrongBytes,
        ("k_ready[0] was told to expect 16384 bytes more", "nbytes * 2)", "mbarrier.wait(k_ready"),
    ),
    Fault(
        "each waits for the other to begin",
        "specialized",
        (("mbarrier.wait(free.index(slot), phase ^ 1)", "mbarrier.wait(free.index(slot), phase)"),),
        Deadlock,
        ("produce waits for k_free[0], phase 0", "consume waits for k_ready[0], phase 0", "with 0 of 1 arrivals"),
    ),
    Fault(
        "an accumulator used before the tensor cores are done",
        "tma_wgmma",
        ((IMPORT, f"tma, warpgroup_mma, {WAIT}\n"), (PV, PV_ASYNC)),
        Race,
        ("on the accumulator", "acc = warpgroup_mma(", "acc = acc * gl.convert_layout(rescale"),
    ),
    Fault(
        "a wait that leaves the product in flight",
        "tma_wgmma",
        ((IMPORT, f"tma, warpgroup_mma, {WAIT}\n"), (PV, f"{PV_ASYNC}        acc = {WAIT}(1, deps=(acc,))\n")),
        Race,
        ("on the accumulator", "acc = warpgroup_mma(", "in finish"),
    ),
    Fault(
        "the program ends while the output is still being copied",
        "pipelined",
        (("    tma.store_wait(0)\n", ""),),
        UseAfterFree,
        ("q_smem", "tma_store(o_desc", "tma.store_wait(0)"),
    ),
    Fault(
        "the output over the queries while they are still read",
        "specialized",
        ((QK, f"q_tile.store(gl.full([BLOCK_M, D], 0.0, dtype, out_layout))\n        {QK}"),),
        MissingFence,
        ("on q_smem", "q_tile.store(gl.full(", "scores = warpgroup_mma("),
    ),
    Fault(
        "a barrier that was never initialised",
        "tma_wgmma",
        (("q_ready = allocate_barriers(1, 1)", f"q_ready = {UNINITIALISED}"),),
        BadBarrier,
        ("q_ready is not initialised", "mbarrier.expect(barrier"),
    ),
    Fault(
        "every tile into the first slot",
        "pipelined",
        (("ready.index(slot), ring.index(slot))", "ready.index(slot), ring.index(0))"),),
        Race,
        ("on k_ring[0]", "tma_load(desc"),
    ),
    Fault(
        "a copy that was forgotten",
        "pipelined",
        (
            ("        load_tile(v_desc, batch, tile, kv_column, v_ready, v_ring, STAGES)\n", ""),
            ("        mbarrier.wait(v_ready.index(slot), phase)\n", ""),
        ),
        Unwritten,
        ("v_ring[0] is read, and nothing was written there", "acc = warpgroup_mma("),
    ),
    Fault(
        "more slots than shared memory has room for",
        "pipelined",
        (("dtype, [STAGES] + v_desc", "dtype, [8 * STAGES] + v_desc"),),
        OutOfBounds,
        ("a block has 232448", "v_ring 262144"),
    ),
    Fault(
        "a phase that counts on",
        "pipelined",
        (("phase = tile // STAGES & 1", "phase = tile // STAGES"),),
        BadBarrier,
        ("k_ready[0] at phase 2", "mbarrier.wait(k_ready.index(slot), phase)", "phase & 1"),
    ),
    Fault(
        "an arrival where bytes should be expected",
        "tma_wgmma",
        (("mbarrier.expect(barrier, desc.block_type.nbytes)", "mbarrier.arrive(barrier)"),),
        WrongBytes,
        ("q_ready does not expect the copy", "tma_load(desc", "scores = warpgroup_mma("),
    ),
    Fault(
        "a barrier initialised by one of the partitions that meet at it",
        "specialized",
        (
            ("q_ready = allocate_barriers(1, 1)", f"q_ready = {UNINITIALISED}"),
            ("mbarrier.wait(q_ready, 0)", "mbarrier.init(q_ready, count=1)\n    mbarrier.wait(q_ready, 0)"),
        ),
        Race,
        ("on q_ready", "mbarrier.init(q_ready, count=1)", "[consume]", "mbarrier.expect(q_ready", "[produce]"),
        (BadBarrier,),
    ),
    Fault(
        "a barrier initialised again in every turn",
        "tma_wgmma",
        (("        phase = tile & 1\n", "        phase = 0\n        mbarrier.init(k_ready, count=1)\n"),),
        BadBarrier,
        ("k_ready is initialised again", "mbarrier.init(k_ready, count=1)"),
    ),
]  # fmt: skip


def run(fault, tmp_path, monkeypatch, **options):
    """One head, five tiles of keys: each slot of two is filled more than once."""
    monkeypatch.setitem(RUNGS, "planted", plant(fault.rung, tmp_path, *fault.edits))
    attention(*random_qkv((128, 600), (1, 1), 64, torch.bfloat16), rung="planted", **options)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_named(fault, tmp_path, monkeypatch):
    with pytest.raises(Report) as caught:
        run(fault, tmp_path, monkeypatch)
    assert type(caught.value) is fault.report, caught.value
    for name in fault.names:
        assert name in str(caught.value), f"{name!r} is not in: {caught.value}"
    assert "planted_" in str(caught.value)  # the file, with its line


def test_a_report_is_the_same_every_time(tmp_path, monkeypatch):
    fault = FAULTS[4]
    monkeypatch.setitem(RUNGS, "planted", plant(fault.rung, tmp_path, *fault.edits))
    reports = []
    for _ in range(2):
        with pytest.raises(Report) as caught:
            attention(*random_qkv((128, 600), (1, 1), 64, torch.bfloat16), rung="planted")
        reports.append(str(caught.value))
    assert reports[0] == reports[1]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.report is not OutOfBounds], ids=str)
def test_a_fault_does_not_hide_in_another_order(fault, tmp_path, monkeypatch):
    """A fault is found in every order, though another order may report another symptom of it."""
    for seed in range(3):
        monkeypatch.setattr(launch, "Program", lambda *args, seed=seed: Program(*args[:3], f"order {seed}"))
        with pytest.raises((fault.report, *fault.elsewhere)):
            run(fault, tmp_path, monkeypatch, block_m=64, block_n=64)


@pytest.mark.parametrize("text", ["README.md", "docs/emulator.md", "docs/hopper.md"])
def test_there_are_as_many_faults_as_the_docs_say(text):
    number = {22: "twenty-two"}[len(FAULTS)]
    assert f"{number} faults" in (Path(__file__).resolve().parents[2] / text).read_text(encoding="utf-8").lower()

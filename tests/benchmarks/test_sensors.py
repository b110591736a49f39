"""The GPU's clock, power and reasons to slow down, by an nvidia-smi of the test."""

from __future__ import annotations

import time

import pytest

from benchmarks import sensors

SMI = """#!/bin/sh
case "$*" in
*{refused}*) echo "Field \\"clocks_event_reasons.active\\" is not a valid field to query."; exit 2;;
esac
echo "{answer}"
"""
LOADED = "1755, 1980, 689.33, 700.00, 61, 0x0000000000000004"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    def answers(answer: str, refused: str = "nothing-is") -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(SMI.format(answer=answer, refused=refused))
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return answers


@pytest.mark.parametrize("refused", ["nothing-is", "clocks_event_reasons"])
def test_a_reading_has_clock_power_and_reasons_with_new_drivers_and_old_ones(smi, refused):
    smi(LOADED, refused)
    assert sensors.read("GPU-1") == {
        "sm clock MHz": 1755.0,
        "highest sm clock MHz": 1980.0,
        "power W": 689.33,
        "power limit W": 700.0,
        "temperature C": 61.0,
        "slowed by": ["power cap"],
    }


def test_what_the_gpu_does_not_tell_is_none(smi):
    smi("1755, 1980, [N/A], [N/A], 61, [N/A]")
    reading = sensors.read()
    assert reading["power W"] is None and reading["slowed by"] is None and reading["sm clock MHz"] == 1755


def test_without_nvidia_smi_it_says_so(tmp_path, monkeypatch, smi):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert sensors.read() == {"not read": "nvidia-smi: FileNotFoundError"}
    with sensors.Watch() as watch:
        time.sleep(0.05)
    assert watch.summary() == {"not read": "nvidia-smi: FileNotFoundError"}


def test_a_watch_keeps_what_was_read_under_load(smi):
    smi(LOADED)
    with sensors.Watch() as watch:
        deadline = time.monotonic() + 20
        while not watch.readings and time.monotonic() < deadline:
            time.sleep(0.01)
    summary = watch.summary()
    assert summary["lowest sm clock MHz"] == summary["sm clock MHz"] == 1755 and summary["slowed by"] == ["power cap"]
    assert isinstance(summary["readings"], float) and summary["readings"] >= 1


def test_a_load_shorter_than_a_reading_has_none(smi, monkeypatch):
    smi(LOADED)
    read = sensors.read
    monkeypatch.setattr(sensors, "read", lambda device: (time.sleep(0.2), read(device))[1])
    with sensors.Watch() as watch:
        pass
    assert watch.summary() == {"not read": "the calls ended before nvidia-smi answered"}

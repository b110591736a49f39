"""The GPU's clock, power and reasons to slow down, read by nvidia-smi while something runs. Nothing is set."""

from __future__ import annotations

import subprocess
import threading
from statistics import median

import torch

FIELDS = ("clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # new drivers' name, and older ones'
BITS = {  # NVML's nvmlClocksEventReasons
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
Reading = dict[str, float | list[str] | str | None]
PAUSE = 0.05  # seconds between two readings
NO_GPU: Reading = {"not read": "no GPU: clock, power and reasons to slow down are those of a GPU"}


def read(device: str = "") -> Reading:
    """One reading.

    Args:
        device: the GPU's UUID; the first one where it is empty.

    Returns:
        "sm clock MHz", its maximum, "power W", its limit, "temperature C" (each None where the GPU does not tell), and
        "slowed by": a list of words; or only "not read": why.
    """
    failure = ""
    for reasons in REASONS:
        query = [f"--query-gpu={','.join((*FIELDS, reasons))}", "--format=csv,noheader,nounits"]
        command = ["nvidia-smi", *([f"--id={device}"] if device else []), *query]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"not read": f"nvidia-smi: {type(error).__name__}"}
        if run.returncode == 0 and run.stdout.strip():
            return _parsed(run.stdout.splitlines()[0])
        failure = (run.stdout + run.stderr).strip().splitlines()[0] if run.stdout + run.stderr else "no answer"
    return {"not read": f"nvidia-smi: {failure}"}


def _parsed(line: str) -> Reading:
    *values, active = [value.strip() for value in line.split(",")]
    names = ("sm clock MHz", "highest sm clock MHz", "power W", "power limit W", "temperature C")
    mask = int(active, 16) if active.startswith("0x") else None
    slowed = None if mask is None else [word for bit, word in BITS.items() if mask & bit]
    return {**dict(zip(names, map(_number, values), strict=True)), "slowed by": slowed}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return None


def uuid_of_current_gpu() -> str:
    """The UUID by which nvidia-smi knows the current CUDA device, which may have another number there."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


class Watch:
    """Reads again and again in a thread, while its `with` block runs.

    Args:
        device: as in `read`.
    """

    def __init__(self, device: str = ""):
        self.device = device
        self.readings: list[Reading] = []

    def __enter__(self) -> Watch:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._end.is_set():
            reading = read(self.device)
            if not self._end.is_set():  # else the load had gone before it was read
                self.readings.append(reading)
            if "not read" in reading:
                return
            self._end.wait(PAUSE)

    def summary(self) -> Reading:
        """Lowest and median clock, median power, all reasons to slow down, and the number of readings."""
        found = [reading for reading in self.readings if "not read" not in reading]
        if not found:
            return self.readings[0] if self.readings else {"not read": "the calls ended before nvidia-smi answered"}
        clocks, powers = ([v for r in found if isinstance(v := r[name], float)] for name in ("sm clock MHz", "power W"))
        reasons = [words for reading in found if isinstance(words := reading["slowed by"], list)]
        return {
            "sm clock MHz": median(clocks) if clocks else None,
            "lowest sm clock MHz": min(clocks) if clocks else None,
            "power W": median(powers) if powers else None,
            "slowed by": sorted({word for words in reasons for word in words}) if reasons else None,
            "readings": float(len(found)),
        }

"""Shared by the CPU benchmarks: runs in turns, ratios with their spread, results stored with their origin."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.machine import ROOT, commit


def take_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls each run once a round, so that noise affects all of them; the first round is a warm-up.

    Args:
        runs: each returns its own figure, such as tokens/s.
        rounds: how many are recorded.
    """
    results: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            figure = run()
            if turn:
                results[name].append(figure)
    return results


def spread(figures: list[float]) -> dict[str, float]:
    """The median, and the 10th and 90th percentile."""
    low, *_, high = quantiles(figures, n=10)
    return {"median": median(figures), "p10": low, "p90": high}


def ratio(results: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    """The spread of one run's figure over another's, round by round."""
    return spread([a / b for a, b in zip(results[name], results[to], strict=True)])


def save(name: str, figures: dict) -> Path:
    """Writes benchmarks/results/<machine>/<name>.json with device, versions, date and commit."""
    where = {
        "device": device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "date": f"{date.today()}",
        "commit": commit(),
    }
    path = ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**where, **figures}, indent=1) + "\n")
    return path.relative_to(ROOT)


def device() -> str:
    """The CPU's name and the number of threads in use."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

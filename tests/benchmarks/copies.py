"""The benchmark with other suites: a copy of its folder, run as a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SUITE = '''"""{title}."""

import os, sys, time as clock

def why_not(machine):
    return ""

def checks(machine):
    return {checks}

def subject(case):
    return {subject}

def check(machine, case):
    {check}
    return 1

def timings(machine):
    return {timings}

def time(machine, case):
    {time}
'''
DEFAULTS = {"checks": '["one"]', "subject": '""', "check": "pass", "timings": '["a", "b", "c"]'}
DEFAULTS["time"] = "yield {'case': case, 'speed': 1.0}"


def copy_with(folder: Path, suites: dict[str, dict[str, str]]) -> Path:
    """A copy of benchmarks/ in which these are the suites, each given by what differs from a quick and right one."""
    left_out = shutil.ignore_patterns("results", "hopper.py", "flash_attention.py", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=left_out)
    for name, parts in suites.items():
        text = SUITE.format(title=name.title(), **(DEFAULTS | parts))
        (folder / f"benchmarks/suites/{name}.py").write_text(text)
    return folder


def bench_gpu(*arguments, path, timeout=None):
    """Runs the benchmark; the last of `path` is where it is."""
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(command, cwd=path[-1], env=environment, capture_output=True, text=True, timeout=timeout)


def stored(folder: Path) -> dict[str, dict]:
    """The results in a folder, by suite."""
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

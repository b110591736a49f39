"""Child processes that work through cases, and the parent that watches them.

A child saves its `Progress` before and after each case. So a case that takes its process down, or does not end, costs
itself: the parent notes it and starts a new process behind it. At a step's deadline the process is killed, and what it
had not ended is left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.machine import BROKEN, ROOT

POLL = 0.05  # seconds
PATIENCE = 60.0  # seconds without a sign of life after which a case that is timed is given up


@dataclass
class ChildRun:
    """The work of one child.

    Args:
        suite: its name.
        steps: "check" or "time", each with its deadline by `time.monotonic()`, which all processes share.
        progress: the file of its `Progress`.
        part, parts: which part of the checks is its own.
        failed: what is not to be tried, and why; "" stands for the whole suite.
    """

    suite: str
    steps: list[tuple[str, float]]
    progress: str
    part: int = 0
    parts: int = 1
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Progress:
    """How far a child has come. Cases are counted by step.

    Args:
        why_not: why the suite cannot run on this machine.
        step, next: the step's number, and that of the first case in it that has not ended.
        running, subject: the case that has begun, as text, and what its failure costs.
        trying: what `Machine.attempt` has begun.
        total, ended: the number of cases, and of those that ended, right or wrong.
        kept: the rows of all cases that ended.
        lost: what took its process down in an attempt, and how.
        slow: cases that the deadline stopped.
    """

    title: str = ""
    why_not: str = ""
    step: int = 0
    next: int = 0
    running: str = ""
    subject: str = ""
    trying: str = ""
    total: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    rows: list[dict] = field(default_factory=list)
    kept: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    slow: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: str) -> Progress:
        """The saved one, or a new one where there is none."""
        return cls(**json.loads(Path(path).read_text())) if Path(path).exists() else cls()

    def save(self, path: str) -> None:
        """Replaces the file at once, so that a kill leaves the old or the new one."""
        unfinished = Path(path).with_suffix(".part")
        unfinished.write_text(json.dumps(asdict(self)))
        unfinished.replace(path)

    def fail(self, step: str, error: str) -> None:
        """The running case ended wrongly. Rows that it had yielded stay."""
        self.failures.append({"step": step, "case": self.running, "error": error, "subject": self.subject})
        self.end(step)

    def end(self, step: str) -> None:
        """The running case ended."""
        self.ended[step] = self.ended.get(step, 0) + 1
        self.next, self.kept, self.running, self.trying = self.next + 1, len(self.rows), "", ""


class Child:
    """A `ChildRun` in a process, and in the next one after that.

    Args:
        command: to which the run is appended as JSON.
        environment: the process's variables.
        patience: seconds without a sign of life after which a case that is timed is given up.
    """

    def __init__(self, run: ChildRun, command: list[str], environment: dict[str, str], patience: float = PATIENCE):
        self.run, self.command, self.environment, self.patience = run, command, environment, patience
        self.start()

    def start(self) -> None:
        """Starts the process, in a session of its own."""
        command = [*self.command, json.dumps(asdict(self.run))]
        self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, start_new_session=True)
        self.alive, self.life, self.seen = True, time.monotonic(), self.saved()

    def saved(self) -> int:
        """When its progress was saved, in ns; 0 before."""
        path = Path(self.run.progress)
        return path.stat().st_mtime_ns if path.exists() else 0

    def watch(self) -> None:
        """Looks once: notes what ended or must end, and starts the next process where there is work left."""
        if self.saved() != self.seen:
            self.seen, self.life = self.saved(), time.monotonic()
        code = self.process.poll()
        progress = Progress.load(self.run.progress)
        step, until = self.run.steps[min(progress.step, len(self.run.steps) - 1)]
        late = time.monotonic() > until
        silent = step == "time" and bool(progress.running) and time.monotonic() > self.life + self.patience
        if code is not None:
            self.alive = False
            if code:
                self._ended_by_itself(progress, step, code)
        elif late or silent:
            self.kill()
            after = Progress.load(self.run.progress)  # it may have gone on until it was killed
            if late and after.step == progress.step:
                after.slow += [after.running] if after.running else []
                after.step, after.next, after.running, after.trying = after.step + 1, 0, "", ""
            if late or after != progress:
                self._go_on(after)
            else:
                self._lose(after, step, f"no end after {self.patience:.0f} s")

    def _ended_by_itself(self, progress: Progress, step: str, code: int) -> None:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if progress.running:
            self._lose(progress, step, "took the CUDA context down" if code == BROKEN else how)
        elif code == BROKEN:  # the case is noted already
            self._go_on(progress)
        else:
            progress.failures.append({"step": step, "case": "", "error": how, "subject": ""})
            progress.save(self.run.progress)

    def _lose(self, progress: Progress, step: str, how: str) -> None:
        if progress.trying:
            progress.lost[progress.trying], progress.trying = how, ""  # and the case begins again without it
        else:
            progress.fail(step, how)
        self._go_on(progress)

    def _go_on(self, progress: Progress) -> None:
        progress.save(self.run.progress)
        if progress.step < len(self.run.steps):
            self.start()

    def kill(self) -> None:
        """Ends the process, and the compilers that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.alive = False


def run_children(children: list[Child], on_change: Callable[[list[Progress]], None]) -> list[Progress]:
    """Watches children to their ends; calls `on_change` with what there is whenever one has saved something."""
    seen: list[int] = []
    try:
        while alive := [child for child in children if child.alive]:
            time.sleep(POLL)
            for child in alive:
                child.watch()
            if seen != (seen := [child.saved() for child in children]):
                on_change([Progress.load(child.run.progress) for child in children])
    finally:
        for child in children:
            child.kill()
    return [Progress.load(child.run.progress) for child in children]


def supervise(command: list[str], seconds: float, environment: dict[str, str]) -> str:
    """Runs one command, and kills it at its limit. Returns its failure, "" where it ended with status 0."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ended with status {code}" if code else ""

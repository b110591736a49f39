"""Where a student's code runs: bubblewrap, an unprivileged user, and limits on all that a process can take.

In there are Python, torch and an empty `/tmp`. The course, its solutions, the other submissions, the gradebook, the
home folder and the network are not. What no single limit covers, many processes with much memory each, a watchdog
adds up from outside.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from grading import proc
from grading.bubblewrap import (
    FIRST_USER,
    HERE,
    MEBIBYTE,
    Limits,
    SandboxError,
    become,
    bubblewrap,
    environment,
    prlimit,
)
from grading.seccomp import seccomp_file

USERS = 64  # sandboxes at a time on this machine, each with a user of its own


class Sandbox:
    """A student's process with all that it started, and the socket to talk to it.

    Attributes:
        connection: our end of the socket.
        ended: why the watchdog ended it; None as long as it did not.
    """

    def __init__(self, limits: Limits | None = None, unsafe: bool = False):
        self.limits, self.unsafe = limits or Limits(), unsafe
        self.ended: str | None = None
        self.worker = 0  # its process id
        self._most = 0  # resident bytes of it that the watchdog has seen
        _write_byte_code()
        self.connection, theirs = socket.socketpair()
        self._folder = tempfile.TemporaryDirectory(prefix="grading-") if unsafe else None
        self._lock: socket.socket | None = None
        self._user: int | None = None
        if not unsafe and os.getuid() == 0:
            self._lock, self._user = _a_free_user()
        with theirs, seccomp_file() as filter_file:
            inside = theirs.fileno()
            command = [*prlimit(self.limits), *_python(inside, unsafe)]
            if not unsafe:
                command = bubblewrap(command, self._user, filter_file.fileno())
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(inside,) if unsafe else (inside, filter_file.fileno()),
                start_new_session=True,
                cwd=self._folder.name if self._folder else "/",
                env=environment(self._folder.name) if self._folder else {"PATH": "/usr/bin:/bin"},
            )
        self.first_output = b""  # the error of bwrap, where it cannot start
        self._watching = [threading.Thread(target=work, daemon=True) for work in (self._drain, self._watch)]
        for thread in self._watching:
            thread.start()

    def trust_now(self) -> None:
        """Notes which process is the worker; called before any of the student's code has run."""
        leaves = [process for process in self.processes() if not proc.children(process)]
        if len(leaves) != 1:
            raise SandboxError(f"expected one process in the sandbox, found {len(leaves)}")
        self.worker = leaves[0]

    def processes(self) -> list[int]:
        """The ids of all processes in the sandbox, parents first; bubblewrap's own are among them."""
        found = [self._process.pid] if self._process.poll() is None else []
        for process in found:
            found += proc.children(process) if len(found) < 1000 else []
        return found

    def freeze(self) -> None:
        """Forbids the worker new processes and larger files, and kills all others in the sandbox.

        After that a function that the grader calls can use the memory of the worker only, which is measured.
        """
        # A process may lower the limits of its own user's processes; root may not, in some containers.
        change = ["prlimit", f"--pid={self.worker}", "--nproc=0:0", "--fsize=0:0"]
        subprocess.run([*become(self._user), *change], check=True)
        for _ in range(100):
            line = self._line_of_descent()
            others = [process for process in self.processes() if process not in line and proc.is_alive(process)]
            if not others:
                return
            for signal_number in (signal.SIGSTOP, signal.SIGKILL):
                for process in others:
                    proc.send(process, signal_number)
            time.sleep(0.01)
        self.end("it kept starting processes")

    def _line_of_descent(self) -> list[int]:
        """The worker, and the processes between it and the grader."""
        line = [self.worker]
        for process in reversed(self.processes()):
            if line[-1] in proc.children(process):
                line.append(process)
        return line

    def end(self, reason: str | None = None) -> None:
        """Ends every process in the sandbox."""
        self.ended = self.ended or reason
        for process in reversed(self.processes()):
            proc.send(process, signal.SIGKILL)

    def close(self) -> None:
        """Ends every process in the sandbox and removes its files."""
        self.end()
        self._process.wait()
        for thread in self._watching:
            thread.join(timeout=5)
        if self._process.stdout:
            self._process.stdout.close()
        self.connection.close()
        if self._lock:
            self._lock.close()
        if self._folder:
            self._folder.cleanup()

    def reset_peak(self) -> None:
        """Resets the peak of the worker's resident memory."""
        self._most = 0
        with suppress(OSError):
            Path(f"/proc/{self.worker}/clear_refs").write_text("5")

    def memory(self) -> tuple[int, int]:
        """Bytes of the worker that are resident now, and at most since `reset_peak`; 0 where it is gone.

        The kernel's peak is exact, and begins anew when a process executes another program; the watchdog's samples
        cover that.
        """
        sizes = proc.sizes_in(f"/proc/{self.worker}/status", "VmRSS", "VmHWM")
        return sizes["VmRSS"], max(sizes["VmHWM"], self._most)

    def _drain(self) -> None:
        """Reads and discards what the sandbox prints, so that it never blocks on a full pipe."""
        assert self._process.stdout is not None
        count = 0
        with suppress(ValueError, OSError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                self.first_output = (self.first_output + part)[:2000]
                count += len(part)
                if count > self.limits.output_bytes:
                    return self.end(f"it printed more than {self.limits.output_bytes // MEBIBYTE} MiB")

    def _watch(self) -> None:
        while self._process.poll() is None:
            processes = self.processes()
            self._most = max(self._most, proc.resident(self.worker))
            # The first sum counts a shared page once for each process; the second counts it once, and is slow.
            if sum(map(proc.resident, processes)) > self.limits.memory < sum(map(proc.own_part, processes)):
                return self.end(f"it used more than {self.limits.memory // MEBIBYTE} MiB of memory")
            time.sleep(0.05)


def _python(descriptor: int, unsafe: bool) -> list[str]:
    return [sys.executable, "-I", "-B", f"{HERE if unsafe else '/grader'}/worker.py", str(descriptor)]


def _a_free_user() -> tuple[socket.socket, int]:
    """A user id that no other sandbox on this machine has, and the lock that keeps it so."""
    for user in range(FIRST_USER, FIRST_USER + USERS):
        lock = socket.socket(socket.AF_UNIX)
        try:
            lock.bind(f"\0minillm-grading-{user}")
            return lock, user
        except OSError:
            lock.close()
    raise SandboxError(f"{USERS} sandboxes are running already")


@cache
def _write_byte_code() -> None:
    """Compiles what every sandbox imports, unless that was done: a sandbox cannot store byte code, and starts in half
    the time with it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    if not Path(spec.origin).with_name("__pycache__").exists():
        imports = "import sys; sys.path[:0] = sys.argv[1:]; import worker, triton.language, matplotlib.pyplot"
        subprocess.run([sys.executable, "-I", "-c", imports, str(HERE)], capture_output=True, env={})

"""Where a student's code runs: bubblewrap, an unprivileged user, and limits on all that a process can take.

In there are Python, torch and an empty `/tmp`. The course, its solutions, the other submissions, the gradebook, the
home folder and the network are not. What no single limit covers, many processes with much memory each, a watchdog
adds up from outside.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# All of the course that is visible in there.
INSIDE = (HERE / "protocol.py", HERE / "worker.py", HERE.parent / "tasks" / "triton_programs.py")

INSTALL = """Grading runs the students' code in a sandbox, and bubblewrap, which makes it, is not installed.
  Debian, Ubuntu:  sudo apt install bubblewrap
  Fedora:          sudo dnf install bubblewrap
  macOS, Windows:  grade in the course's container (see Dockerfile), with bubblewrap in it
With --unsafe-no-sandbox the students' code runs as you, and can read and delete whatever you can."""

FIRST_USER = 61000  # as root: a user of its own for each sandbox, because a limit on processes counts by user
USERS = 64
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one student's sandbox may take, for one unit."""

    memory: int = 2048 * MEBIBYTE  # of all its processes together, resident
    address_space: int = 24 << 30  # of a process; CUDA builds of torch map much and use little
    cpu_seconds: int = 300
    processes: int = 64
    file_bytes: int = 32 * MEBIBYTE  # of one file; all of /tmp has twice that
    output_bytes: int = 16 * MEBIBYTE  # on descriptors 1 and 2: read and thrown away; beyond it the sandbox is ended


class SandboxError(Exception):
    """The sandbox itself does not work here: for the instructor, not for the student."""


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
        with theirs, _seccomp_file() as filter_file:
            inside = theirs.fileno()
            command = [*_prlimit(self.limits), *_python(inside, unsafe)]
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
                env=_environment(self._folder.name) if self._folder else {"PATH": "/usr/bin:/bin"},
            )
        self.first_words = b""  # of its output: what bwrap says where it cannot start
        self._watching = [threading.Thread(target=work, daemon=True) for work in (self._drain, self._watch)]
        for thread in self._watching:
            thread.start()

    def trust_now(self) -> None:
        """Notes which process is the worker; called before any of the student's code has run."""
        leaves = [process for process in self.processes() if not _children(process)]
        if len(leaves) != 1:
            raise SandboxError(f"expected one process in the sandbox, found {len(leaves)}")
        self.worker = leaves[0]

    def processes(self) -> list[int]:
        """The ids of all processes in the sandbox, parents first; bubblewrap's own are among them."""
        found = [self._process.pid] if self._process.poll() is None else []
        for process in found:
            found += _children(process) if len(found) < 1000 else []
        return found

    def close_the_doors(self) -> None:
        """From here on, the worker starts no process and no file grows; what else runs in there is ended.

        So a function that is called by the grader has the memory of its own process only, which can be measured.
        """
        # A process may lower the limits of its own user's processes; root may not, in some containers.
        change = ["prlimit", f"--pid={self.worker}", "--nproc=0:0", "--fsize=0:0"]
        subprocess.run([*_become(self._user), *change], check=True)
        for _ in range(100):
            line = self._line_of_descent()
            others = [process for process in self.processes() if process not in line and _lives(process)]
            if not others:
                return
            for signal_number in (signal.SIGSTOP, signal.SIGKILL):
                for process in others:
                    _signal(process, signal_number)
            time.sleep(0.01)
        self.end("it kept starting processes")

    def _line_of_descent(self) -> list[int]:
        """The worker, and the processes between it and the grader."""
        line = [self.worker]
        for process in reversed(self.processes()):
            if line[-1] in _children(process):
                line.append(process)
        return line

    def end(self, reason: str | None = None) -> None:
        """Ends every process in the sandbox."""
        self.ended = self.ended or reason
        for process in reversed(self.processes()):
            _signal(process, signal.SIGKILL)

    def close(self) -> None:
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
        """Starts the peak of the worker's resident memory anew."""
        self._most = 0
        with suppress(OSError):
            Path(f"/proc/{self.worker}/clear_refs").write_text("5")

    def memory(self) -> tuple[int, int]:
        """Bytes of the worker that are resident now, and at most since `reset_peak`; 0 where it is gone.

        The kernel's peak is exact, and begins anew when a process puts another program in its own place. That, the
        watchdog sees.
        """
        sizes = _kibibytes(f"/proc/{self.worker}/status", "VmRSS", "VmHWM")
        return sizes["VmRSS"], max(sizes["VmHWM"], self._most)

    def _drain(self) -> None:
        """Reads what the sandbox prints, so that it never waits for a reader, and throws it away."""
        assert self._process.stdout is not None
        count = 0
        with suppress(ValueError, OSError):
            while part := os.read(self._process.stdout.fileno(), 1 << 16):
                self.first_words = (self.first_words + part)[:2000]
                count += len(part)
                if count > self.limits.output_bytes:
                    return self.end(f"it printed more than {self.limits.output_bytes // MEBIBYTE} MiB")

    def _watch(self) -> None:
        while self._process.poll() is None:
            processes = self.processes()
            self._most = max(self._most, _resident(self.worker))
            # Pages that processes share stand in the first sum once for each; the second is right, and slow.
            if sum(map(_resident, processes)) > self.limits.memory < sum(map(_own_part, processes)):
                return self.end(f"it used more than {self.limits.memory // MEBIBYTE} MiB of memory")
            time.sleep(0.05)


def _children(process: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    return found


def _resident(process: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _own_part(process: int) -> int:
    """Resident bytes, each page divided by the number of processes that share it."""
    return _kibibytes(f"/proc/{process}/smaps_rollup", "Pss")["Pss"]


def _kibibytes(path: str, *names: str) -> dict[str, int]:
    """Sizes from one of the kernel's tables, in bytes; 0 where there is none."""
    found = dict.fromkeys(names, 0)
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found


def _lives(process: int) -> bool:
    """Whether it is more than an entry in the table that its parent has not read yet."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def find_bubblewrap() -> str:
    """The path of bwrap.

    Raises:
        SandboxError: it is not installed, or cannot make a sandbox here; says what to do.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(INSTALL)
    command = bubblewrap([*_prlimit(Limits()), "/bin/true"], None if os.getuid() else FIRST_USER, seccomp=None)
    trial = subprocess.run(command, capture_output=True, text=True)
    if trial.returncode:
        raise SandboxError(
            f"bubblewrap is installed and cannot make a sandbox here: {trial.stderr.strip()[:300]}\n"
            "In a container, allow user namespaces, as in: docker run --security-opt seccomp=unconfined …"
        )
    return found


def bubblewrap(command: list[str], user: int | None, seccomp: int | None) -> list[str]:
    """The command line that runs a command in the sandbox.

    Args:
        command: what to run in there.
        user: as root, the id to drop to; None is who we are.
        seccomp: the descriptor of the filter of system calls.
    """
    line = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--hostname", "grading"]
    # Root has no need of a user namespace, and an unprivileged user cannot do without.
    line += ["--unshare-all"] if os.getuid() else [f"--unshare-{n}" for n in ("ipc", "pid", "net", "uts", "cgroup-try")]
    line += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        place = Path("/", name)
        if place.is_symlink():
            line += ["--symlink", os.readlink(place), str(place)]
        elif place.is_dir():
            line += ["--ro-bind", str(place), str(place)]
    line += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    line += ["--proc", "/proc", "--dev", "/dev"]
    line += ["--perms", "1777", "--size", str(2 * Limits.file_bytes), "--tmpfs", "/tmp"]
    for place in _pythons_places():
        line += [*_parents(place), "--ro-bind", str(place), str(place)]
    line += ["--dir", "/grader"]
    for file in INSIDE:
        line += ["--ro-bind", str(file), f"/grader/{file.name}"]
    for name, text in _environment("/tmp").items():
        line += ["--setenv", name, text]
    # In the first two is memory without a limit, in the third the switch that resets the measured peak.
    line += [*("--remount-ro", "/dev"), *("--remount-ro", "/"), *("--remount-ro", "/proc"), "--chdir", "/tmp"]
    if seccomp is not None:
        line += ["--seccomp", str(seccomp)]
    if user is not None:
        line += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        command = [*_become(user), *command]
    return [*line, "--", *command]


def _become(user: int | None) -> list[str]:
    if user is None:
        return []
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    return [*drop, "--bounding-set=-all", "--inh-caps=-all", "--"]


def _pythons_places() -> list[Path]:
    """Where this Python and its packages lie, as far as it is not /usr."""
    found: list[Path] = []
    for prefix in dict.fromkeys((sys.base_prefix, sys.prefix)):
        for part in ("bin", "lib", "lib64", "pyvenv.cfg"):
            place = Path(prefix, part)
            if place.exists() and not place.is_symlink() and not place.is_relative_to("/usr"):
                found.append(place)
    hidden = [place for place in found if ROOT.is_relative_to(place)]
    if ROOT.is_relative_to("/usr") or hidden:
        raise SandboxError(f"{ROOT} lies where Python does, so the sandbox cannot hide it: move the course")
    return found


def _parents(place: Path) -> list[str]:
    """bwrap makes the folders above a bound one for root alone; made by name they are for all."""
    return [word for parent in reversed(place.parents[:-1]) for word in ("--dir", str(parent))]


def _environment(home: str) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "IPYTHONDIR": f"{home}/.ipython",
        "MPLCONFIGDIR": f"{home}/.matplotlib",
        "MPLBACKEND": "agg",
        "USER": "student",
        "LOGNAME": "student",
        "LANG": "C.UTF-8",
        "PIP_NO_INDEX": "1",  # there is no network, and `%pip install` would try it for half a minute
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        # Large buffers come from the system and go back to it at once, so that the peak shows each of them.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
    }


def _prlimit(limits: Limits) -> list[str]:
    wanted = {
        "nproc": limits.processes + (0 if os.getuid() == 0 else _my_threads()),
        "as": limits.address_space,
        "cpu": limits.cpu_seconds,
        "fsize": limits.file_bytes,
        "nofile": 256,
        "core": 0,
    }
    return ["prlimit", *(f"--{name}={_at_most(name, value)}" for name, value in wanted.items()), "--"]


def _at_most(name: str, value: int) -> int:
    """No more than the hard limit of this process, which it could not raise."""
    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _my_threads() -> int:
    """Older kernels count all of a user's threads against the limit of a process, wherever it runs."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            count += len(os.listdir(folder / "task")) if folder.stat().st_uid == os.getuid() else 0
    return count


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
    """Compiles what every sandbox imports, unless that was done: it cannot keep it, and starts in half the time."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    if not Path(spec.origin).with_name("__pycache__").exists():
        imports = "import sys; sys.path[:0] = sys.argv[1:]; import worker, triton.language, matplotlib.pyplot"
        subprocess.run([sys.executable, "-I", "-c", imports, str(HERE)], capture_output=True, env={})


# Memory that no limit counts, other processes' memory, and doors into the kernel: x86-64's number, then ARM64's.
REFUSED = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "fsopen": (430, 430),
    "pivot_root": (155, 41), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "vmsplice": (278, 75), "open_by_handle_at": (304, 265),
}  # fmt: skip
CLONE = {"clone": (56, 220), "clone3": (435, 435)}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def seccomp_filter(machine: str | None = None) -> bytes:
    """A classic BPF program that refuses the calls above, and namespaces, which open the rest again.

    Returns:
        The program for bwrap's --seccomp; empty on a machine whose numbers are not listed.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        return b""
    column, architecture = _ARCHITECTURES[machine]
    allow, kill, refuse, missing = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def unless_equal_skip(value: int, skip: int) -> bytes:
        return struct.pack("HBBI", 0x15, 0, skip, value)

    def give(verdict: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, verdict)

    program = load(4) + struct.pack("HBBI", 0x15, 1, 0, architecture) + give(kill)
    program += load(0) + struct.pack("HBBI", 0x35, 0, 1, 0x40000000) + give(kill)  # x86's third set of numbers
    for numbers in REFUSED.values():
        program += unless_equal_skip(numbers[column], 1) + give(refuse)
    # The C library falls back from clone3 to clone, whose flags a filter can read.
    program += unless_equal_skip(CLONE["clone3"][column], 1) + give(missing)
    program += unless_equal_skip(CLONE["clone"][column], 3) + load(16)
    program += struct.pack("HBBI", 0x45, 0, 1, 0x7E020000) + give(refuse)  # any CLONE_NEW… flag
    return program + give(allow)


def _seccomp_file() -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    file.write(seccomp_filter())
    file.flush()
    file.seek(0)
    return file

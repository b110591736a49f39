"""The command line of bubblewrap: what is visible in the sandbox, and the limits of each process in it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from grading import ROOT

HERE = Path(__file__).resolve().parent
# The files of the course that are visible in the sandbox.
INSIDE = (HERE / "protocol.py", HERE / "worker.py", ROOT / "course" / "tasks" / "triton_programs.py")

INSTALL = """Grading runs the students' code in a sandbox, and bubblewrap, which makes it, is not installed.
  Debian, Ubuntu:  sudo apt install bubblewrap
  Fedora:          sudo dnf install bubblewrap
  macOS, Windows:  grade in the course's container (see Dockerfile), with bubblewrap in it
With --unsafe-no-sandbox the students' code runs as you, and can read and delete whatever you can."""

FIRST_USER = 61000  # as root: a user of its own for each sandbox, because a limit on processes counts by user
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
    """No sandbox can be made on this machine; the message is for the instructor."""


def find_bubblewrap() -> str:
    """The path of bwrap.

    Raises:
        SandboxError: it is not installed, or cannot make a sandbox here; says what to do.
    """
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(INSTALL)
    command = bubblewrap([*prlimit(Limits()), "/bin/true"], None if os.getuid() else FIRST_USER, seccomp=None)
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
        user: as root, the id to drop to; None keeps the current one.
        seccomp: the descriptor of the filter of system calls.
    """
    line = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--hostname", "grading"]
    # Root needs no user namespace; an unprivileged user does.
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
    for name, text in environment("/tmp").items():
        line += ["--setenv", name, text]
    # The first two hold memory without a limit, the third the file that resets the measured peak.
    line += [*("--remount-ro", "/dev"), *("--remount-ro", "/"), *("--remount-ro", "/proc"), "--chdir", "/tmp"]
    if seccomp is not None:
        line += ["--seccomp", str(seccomp)]
    if user is not None:
        line += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
        command = [*become(user), *command]
    return [*line, "--", *command]


def _parents(place: Path) -> list[str]:
    """Options that make the folders above a bound one: bwrap would make them readable for root alone."""
    return [word for parent in reversed(place.parents[:-1]) for word in ("--dir", str(parent))]


def _pythons_places() -> list[Path]:
    """The folders of this Python and its packages, other than those in /usr."""
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


def become(user: int | None) -> list[str]:
    """The beginning of a command line that drops to this user, for root; empty for None."""
    if user is None:
        return []
    drop = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]
    return [*drop, "--bounding-set=-all", "--inh-caps=-all", "--"]


def environment(home: str) -> dict[str, str]:
    """The environment variables of a student's process; none is inherited."""
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


def prlimit(limits: Limits) -> list[str]:
    """The beginning of a command line that sets the limits of the process that it starts."""
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
    """The value, or the hard limit of this process where that is lower: it cannot be raised."""
    hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard)


def _my_threads() -> int:
    """How many threads this user has: older kernels count all of them against `nproc`."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            count += len(os.listdir(folder / "task")) if folder.stat().st_uid == os.getuid() else 0
    return count

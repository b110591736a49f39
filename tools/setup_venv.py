"""Makes `.venv` and installs the course into it: what `make lab` and `make test` do first.

Needs a bare Python and nothing else. With nothing changed it returns at once. After a change of the dependencies
it updates; after an interruption, a move of the folder or a change of interpreter it starts afresh, from pip's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"  # written last, so that only a finished installation has one
LOG = VENV / "install.log"
EXTRAS = "dev,grading,redis,peers"
GIGABYTES = 3.5  # of disk for .venv with the CPU build of torch, and pip's cache beside it

# What pip's output shows when it fails, and the cure. The first that matches is told.
CURES = (
    (
        r"No space left on device|Disk quota exceeded",
        "The disk is full: make room for about 4 GB (12 GB with CUDA), also where TMPDIR points",
    ),
    (
        r"NewConnectionError|NameResolutionError|Failed to establish|ConnectTimeout|ReadTimeout|ProxyError"
        r"|Network is unreachable|Retrying \(Retry",
        "The package index does not answer: check the network (behind a proxy, set HTTPS_PROXY)",
    ),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "The package index's certificate is not trusted here: set PIP_CERT"),
    (r"Permission denied|Read-only file system", "This folder cannot be written to: copy the course to one of yours"),
)


def main() -> None:
    try:
        set_up()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command starts again; what was downloaded is kept.")
    except OSError as error:
        sys.exit(f"{cure(str(error))}.")


def set_up() -> None:
    """Brings `.venv` up to date; exits with one line that names the cure where that fails."""
    wanted, found = fingerprint(), STAMP.read_text().splitlines() if STAMP.exists() else []
    if found == wanted and python_in(VENV).exists():
        return
    start = time.time()
    if found[:2] != wanted[:2] or not python_in(VENV).exists():
        make_venv()
    STAMP.unlink(missing_ok=True)
    print("Installing the course into .venv: minutes the first time, seconds after.", flush=True)
    install()
    STAMP.write_text("\n".join(wanted) + "\n")
    print(f"Installed in {time.time() - start:.0f} s.", flush=True)


def fingerprint() -> list[str]:
    """What an installation depends on: the interpreter, the folder, and the wanted packages."""
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return [f"Python {sys.version_info[0]}.{sys.version_info[1]}", str(ROOT), hashlib.sha256(content).hexdigest()]


def python_in(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / "bin" / "python"


def make_venv() -> None:
    """Makes an empty `.venv` in place of the old one; exits where Python or the disk does not allow it."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        sys.exit(f"This Python cannot make a virtual environment. On Debian or Ubuntu: sudo apt install {package}")
    shutil.rmtree(VENV, ignore_errors=True)
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < GIGABYTES:
        sys.exit(f"{free:.1f} GB are free on this disk, and .venv takes {GIGABYTES}: make room, then run this again.")
    # Inside an activated .venv, sys.executable is the very interpreter that has just been removed.
    base = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run([base, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{cure(made.stdout + made.stderr)}.")


def install() -> None:
    """Installs the course and its extras into `.venv`; exits with the cure where pip fails."""
    command = [str(python_in(VENV)), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--no-compile"]  # of ten thousand files that are never imported: a minute less
    command += ["--constraint", "constraints.txt", "--editable", f".[{EXTRAS}]"]
    with (
        open(LOG, "w") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        try:
            for line in pip.stdout or ():
                log.write(line)
                show(line.strip())
        except KeyboardInterrupt:
            pip.terminate()
            raise
    show("")
    if pip.returncode:
        sys.exit(f"{cure(LOG.read_text())}. Then run this again (pip's output is in .venv/{LOG.name}).")
    # No question about news pops up in front of the first lesson.
    quiet = ["jupyter", "labextension", "disable", "--level=sys_prefix", "@jupyterlab/apputils-extension:announcements"]
    subprocess.run([python_in(VENV), "-m", *quiet], capture_output=True)


def show(line: str) -> None:
    """pip's latest line in place of the one before, where a person is watching."""
    if sys.stdout.isatty():
        width = os.get_terminal_size().columns or 80
        print(f"\r\033[K{line[: width - 1]}", end="", flush=True)


def cure(output: str) -> str:
    """One line for a failure: the cure where its cause is known, else the last error as it was printed."""
    for symptom, line in CURES:
        if re.search(symptom, output):
            return line
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return "The installation failed: " + (errors or lines or ["no reason was given"])[-1].rstrip(".")


if __name__ == "__main__":
    main()

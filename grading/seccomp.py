"""The system calls that are refused in the sandbox, as a filter for bwrap's --seccomp."""

from __future__ import annotations

import platform
import struct
import tempfile
from typing import IO

# Memory that no limit counts, other processes' memory, and parts of the kernel: x86-64's number, then ARM64's.
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


def seccomp_file() -> IO[bytes]:
    """An open file with the filter, for a child that inherits its descriptor."""
    file = tempfile.TemporaryFile()  # noqa: SIM115, the caller closes it
    file.write(seccomp_filter())
    file.flush()
    file.seek(0)
    return file


def seccomp_filter(machine: str | None = None) -> bytes:
    """A classic BPF program that refuses the calls above, and new namespaces, in which they would be allowed.

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

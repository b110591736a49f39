"""The processes below one of ours, and the memory of each, as Linux shows them in /proc."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path


def children(process: int) -> list[int]:
    """The ids of the processes that one of its threads started."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    return found


def resident(process: int) -> int:
    """Bytes of its memory that are resident; a page that it shares with another counts in both."""
    with suppress(OSError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def own_part(process: int) -> int:
    """Resident bytes, each page divided by the number of processes that share it."""
    return sizes_in(f"/proc/{process}/smaps_rollup", "Pss")["Pss"]


def sizes_in(path: str, *names: str) -> dict[str, int]:
    """Sizes by name from a table of the kernel (it writes KiB), in bytes; 0 where there is none."""
    found = dict.fromkeys(names, 0)
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found


def is_alive(process: int) -> bool:
    """Whether the process exists and is no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def send(process: int, number: signal.Signals) -> None:
    """Sends a signal; does nothing where the process has ended."""
    with suppress(ProcessLookupError):
        os.kill(process, number)

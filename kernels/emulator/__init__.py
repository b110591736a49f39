"""Gluon's Hopper subset on a CPU: `@gluon.jit` kernels run as they are, and their races and deadlocks are named.

    from kernels.emulator import emulate
    emulate(kernel, (4, 1, 1), q_desc, …, num_warps=8)                # as kernel[(4, 1, 1)](q_desc, …, num_warps=8)
    emulate(kernel, (4, 1, 1), q_desc, …, num_warps=8, explore=200)   # and in 200 other orders

| file | idea |
|---|---|
| `launch.py` | the same source, run by Python with other globals |
| `values.py` | what is in registers: types, layouts |
| `arithmetic.py` | the words that compute |
| `memory.py` | shared memory, and who touched it |
| `order.py` | who knows of what: what a race is |
| `barriers.py` | mbarriers: arrivals, bytes, phases |
| `units.py` | the engines that work by themselves: TMA, WGMMA |
| `scheduler.py` | partitions of warps, and who runs next |
| `language.py` | the words of `gl`, `tma`, `mbarrier`, by name |
| `reports.py` | what can be wrong, and how it is said |
"""

from kernels.emulator.launch import Run, emulate
from kernels.emulator.reports import (
    BadBarrier,
    BadLayout,
    Deadlock,
    FailedAssert,
    MissingFence,
    NotModelled,
    OutOfBounds,
    Race,
    Report,
    Unwritten,
    UseAfterFree,
    WrongArrivals,
    WrongBytes,
)

__all__ = [
    "BadBarrier",
    "BadLayout",
    "Deadlock",
    "FailedAssert",
    "MissingFence",
    "NotModelled",
    "OutOfBounds",
    "Race",
    "Report",
    "Run",
    "Unwritten",
    "UseAfterFree",
    "WrongArrivals",
    "WrongBytes",
    "emulate",
]

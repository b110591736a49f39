"""Gluon's Hopper subset on a CPU: runs `@gluon.jit` kernels unchanged, and reports their races and deadlocks.

    from kernels.emulator import emulate
    emulate(kernel, (4, 1, 1), q_desc, …, num_warps=8)                # as kernel[(4, 1, 1)](q_desc, …, num_warps=8)
    emulate(kernel, (4, 1, 1), q_desc, …, num_warps=8, explore=200)   # and in 200 other orders

| file | idea |
|---|---|
| `launch.py` | the kernel's own code, run with other globals |
| `values.py` | values in registers: types, layouts |
| `arithmetic.py` | functions that compute |
| `shapes.py` | functions that change a shape, and the layouts that Gluon infers |
| `reductions.py` | `reduce`, and `sum`, `max`, `min` made of it |
| `memory.py` | shared memory, and the accesses to it |
| `global_memory.py` | the accesses to global memory |
| `order.py` | vector clocks: what a race is |
| `barriers.py` | mbarriers: arrivals, bytes, phases |
| `units.py` | the asynchronous engines: TMA, WGMMA |
| `scheduler.py` | partitions of warps, and which runs next |
| `workers.py` | `warp_specialize`: which workers a block can have |
| `language.py` | the emulator's `gl`, `tma`, `mbarrier`, `hopper` |
| `reports.py` | the reports, by kind of fault |
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

"""`Job`, one compilation of a kernel, and `Compiled`, its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kernels.targets import REGISTERS, TARGETS


@dataclass(frozen=True)
class Job:
    """One compilation.

    Args:
        kernel: module and function, such as "kernels.flash_attention.forward:forward_kernel".
        signature: a type for each argument that is no tl.constexpr: "*bf16", "fp32", "i32"; with ":16" behind it if
            the pointer or number is divisible by 16 (a launch checks that, and compiles for it); "1" and "None" for
            an argument of that value; a list for a tuple.
        constants: a value for each tl.constexpr.
        target: one of `kernels.targets`.
        warps, stages: as in a launch.
    """

    kernel: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    target: str
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        blocks = " × ".join(str(size) for name, size in self.constants.items() if name in ("BLOCK_Q", "BLOCK_K"))
        return (
            f"{self.kernel.split(':')[1]} {blocks} with {self.warps} warps and {self.stages} stages for {self.target}"
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job.

    Args:
        instructions: tensor-core instructions in the PTX by kind: "mma.sync", "wgmma", "tcgen05".
        example: the first of them, as it stands in the PTX.
        async_copies: asynchronous copies to shared memory (cp.async, TMA).
        in_flight: groups of cp.async that the most patient wait leaves in flight; 0 where each waits for all of them.
        hopper: the count of each of `listing.HOPPER` in the PTX, where a loop's body stands once.
        registers_set: the distinct register counts that warps set for themselves (setmaxnreg).
        registers: of 32 bits, per thread.
        spilled_bytes: registers spilled to local memory, per thread.
        shared_bytes: shared memory, per program.
        failure: why the job did not compile; empty if it did.
    """

    instructions: dict[str, int] = field(default_factory=dict)
    example: str = ""
    async_copies: int = 0
    in_flight: int = 0
    hopper: dict[str, int] = field(default_factory=dict)
    registers_set: list[int] = field(default_factory=list)
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    failure: str = ""

    def occupancy(self, job: Job) -> float:
        """The share of a multiprocessor's warps that fit: limited by registers, shared memory or programs."""
        target = TARGETS[job.target]
        registers = job.warps * -(-self.registers * 32 // 256) * 256  # allocated to warps in units of 256
        shared = self.shared_bytes + 1024  # the driver takes 1 KiB for each program
        fitting = [target.programs, target.warps // job.warps, (target.shared_kib + 1) * 1024 // shared]
        if registers:
            fitting.append(REGISTERS // registers)
        return min(fitting) * job.warps / target.warps

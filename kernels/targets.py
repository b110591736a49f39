"""The GPUs that kernels are compiled for: the limits of a multiprocessor, by compute capability."""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """The limits of a multiprocessor, and its tensor-core instruction.

    Args:
        capability: compute capability.
        instruction: "mma.sync" (a warp), "wgmma" (four warps, from shared memory) or "tcgen05" (one thread starts it).
        shared_kib: shared memory of one program at most, KiB; the multiprocessor has 1 KiB more.
        warps, programs: resident on a multiprocessor at most.
    """

    capability: tuple[int, int]
    instruction: str
    shared_kib: int
    warps: int
    programs: int


REGISTERS = 65536  # of 32 bits, in a multiprocessor of each of them

# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
TARGETS = {
    "sm_80": Target((8, 0), "mma.sync", 163, 64, 32),  # A100
    "sm_86": Target((8, 6), "mma.sync", 99, 48, 16),  # RTX 30
    "sm_89": Target((8, 9), "mma.sync", 99, 48, 24),  # L4, RTX 40
    "sm_90": Target((9, 0), "wgmma", 227, 64, 32),  # H100, H200
    "sm_100": Target((10, 0), "tcgen05", 227, 64, 32),  # B200
    "sm_120": Target((12, 0), "mma.sync", 99, 48, 24),  # RTX 50
}


def target_of(capability: tuple[int, int]) -> str:
    """The name of a GPU's target: its own, or that of the nearest older one of its generation.

    Raises:
        ValueError: where the GPU is older than all of them, or of a generation that is not among them.
    """
    older = [name for name, target in TARGETS.items() if target.capability <= capability]
    if not older or TARGETS[older[-1]].capability[0] != capability[0]:
        name = "sm_{}{}".format(*capability)
        reason = "it has no tensor-core instruction for our tiles" if capability < (8, 0) else "it is not known here"
        raise ValueError(f"{name} is not supported: {reason}. Supported: {', '.join(TARGETS)}")
    return older[-1]

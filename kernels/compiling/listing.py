"""Reads a compiled kernel: counts instructions in its PTX, registers and spills in its cubin."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from kernels.compiling.job import Compiled

TENSOR_CORE = {"mma.sync": r"mma\.sync\.\S+", "wgmma": r"wgmma\.mma_async\.\S+", "tcgen05": r"tcgen05\.mma\.\S+"}
HOPPER = ("wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier.try_wait", "setmaxnreg")
ASYNC_COPY = r"cp\.async\.(?:c[ag]\.shared|bulk\.tensor)\S*"


def read_listing(ptx: str, cubin: bytes, shared_bytes: int) -> Compiled:
    """The counts and resources of one kernel.

    Args:
        ptx: Triton's PTX.
        cubin: the machine code.
        shared_bytes: dynamic shared memory, from Triton's metadata: the cubin does not hold it.
    """
    found = {kind: re.findall(rf"(?<!w)(?:\b){pattern}", ptx) for kind, pattern in TENSOR_CORE.items()}
    found = {kind: lines for kind, lines in found.items() if lines}
    usage = _resource_usage(cubin)
    return Compiled(
        instructions={kind: len(lines) for kind, lines in found.items()},
        example=next(iter(found.values()))[0] if found else "",
        async_copies=len(re.findall(ASYNC_COPY, ptx)),
        in_flight=max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)), default=0),
        hopper={name: ptx.count(name) for name in HOPPER},
        registers_set=sorted({int(number) for number in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)}),
        registers=usage["REG"],
        spilled_bytes=usage["STACK"],  # our kernels have no arrays in local memory, so all of it is spills
        shared_bytes=shared_bytes,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of the machine code: {"REG": 128, "STACK": 0, …}."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}

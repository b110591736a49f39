"""What a Gluon kernel compiles to on Hopper. No GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HOPPER = GPUTarget("cuda", 90, 32)
INSTRUCTIONS = ("wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier.try_wait", "setmaxnreg")


@dataclass(frozen=True)
class Compiled:
    """A kernel on sm_90a.

    Args:
        instructions: how often each of INSTRUCTIONS stands in its PTX (a loop's body counts once).
        registers: of a thread, on entry.
        spilled: bytes of stack a thread, where registers did not suffice.
        shared: bytes of shared memory a block.
        ptx: the PTX.
    """

    instructions: dict[str, int]
    registers: int
    spilled: int
    shared: int
    ptx: str = field(repr=False)


def compile_for_hopper(kernel: Any, arguments: list[Any], num_warps: int) -> Compiled:
    """Compiles a `@gluon.jit` kernel for these arguments, which may be CPU tensors: only their types count."""
    names = {parameter.name: parameter.is_constexpr for parameter in kernel.params}
    values = dict(zip(names, arguments, strict=False)) | ({"num_warps": num_warps} if "num_warps" in names else {})
    signature = {name: "constexpr" if constant else _type(values[name]) for name, constant in names.items()}
    constants = {name: values[name] for name, constant in names.items() if constant}
    source = GluonASTSource(kernel, signature, constants)
    result = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
    ptx = result.asm["ptx"]
    registers, spilled = _resources(result.asm["cubin"])
    counts = {name: len(re.findall(re.escape(name), ptx)) for name in INSTRUCTIONS}
    return Compiled(counts, registers, spilled, result.metadata.shared, ptx)


def _type(value: Any) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{canonicalize_dtype(value.base.dtype)}{list(value.block_shape)},{value.layout!r}>"
    if isinstance(value, Tensor):
        return f"*{canonicalize_dtype(value.dtype)}"
    return "fp32" if isinstance(value, float) else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what the kernel uses: {usage}")
    return int(found[1]), int(found[2])

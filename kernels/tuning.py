"""Tile sizes, warps and stages of the Triton kernels: a few reasoned choices for each kind of GPU.

The first choice that fits is taken, so that a call compiles once, and gives the same bits every time. `tune` times
all of them on the GPU at hand and keeps the fastest; `chosen` says which ones are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kernels.runtime import prepare

MODE = prepare()


class Config(NamedTuple):
    """One way to compile a kernel.

    Args:
        block_q, block_k: queries and keys in a tile.
        warps: of 32 threads, in a program. Hopper's tensor-core instruction wants them in groups of four, and 64 rows
            for each group.
        stages: tiles that are in shared memory at a time, one in use and the others on their way.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int

    def keywords(self) -> dict[str, int]:
        return dict(BLOCK_Q=self.block_q, BLOCK_K=self.block_k, num_warps=self.warps, num_stages=self.stages)

    def shared_bytes(self, kernel: str, headdim: int, itemsize: int) -> int:
        """Shared memory for the tile that stays and for those that come by, a pair of each (the forward keeps one)."""
        staying, passing = (self.block_k, self.block_q) if kernel == "backward_kv" else (self.block_q, self.block_k)
        kept = 1 if kernel == "forward" else 2
        return (kept * staying + 2 * self.stages * passing) * padded(headdim) * itemsize


def padded(headdim: int) -> int:
    """The headdim as a kernel has it: tl.arange wants a power of two, and tl.dot 16 at least."""
    return max(16, 1 << (headdim - 1).bit_length())


# KiB of shared memory that one program may have, by compute capability (CUDA C++ Programming Guide, table «Technical
# Specifications per Compute Capability»: 1 KiB less than the multiprocessor has).
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227, (12, 0): 99}

# The interpreter runs programs one after another: few large tiles are fast. It does not know warps and stages.
INTERPRETER = Config(64, 64, 4, 1)
# fp32 without TF32 has no tensor cores, and its products are unrolled into single instructions: small tiles.
FULL_PRECISION = Config(32, 32, 4, 1)


def candidates(kernel: str, headdim: int, dtype: torch.dtype, capability: tuple[int, int]) -> list[Config]:
    """The configurations for a kernel, the first choice first, less those that need too much shared memory.

    Args:
        kernel: "forward", "backward_kv" or "backward_q".
        headdim: of the tensors.
        dtype: fp16, bf16 or fp32.
        capability: the GPU's, such as (9, 0).

    Raises:
        ValueError: where the GPU is not known or too old.
    """
    if capability not in SHARED_KIB:
        known = ", ".join("sm_{}{}".format(*pair) for pair in SHARED_KIB)
        raise ValueError(f"sm_{capability[0]}{capability[1]} is not supported, one of {known} is")
    if dtype == torch.float32:
        return [FULL_PRECISION]
    table = WARPGROUP if capability[0] in (9, 10) else WARP
    fitting = table[kernel][max(64, padded(headdim))]
    limit = SHARED_KIB[capability] * 1024
    return [config for config in fitting if config.shared_bytes(kernel, headdim, dtype.itemsize) <= limit]


_tuned: dict[tuple[str, int, torch.dtype], Config] = {}


def choice(kernel: str, headdim: int, dtype: torch.dtype) -> Config:
    """The configuration in use for a kernel on this machine: the tuned one, else the first candidate."""
    if (kernel, headdim, dtype) in _tuned:
        return _tuned[kernel, headdim, dtype]
    if MODE.name == "interpreter":
        return INTERPRETER
    return candidates(kernel, headdim, dtype, torch.cuda.get_device_capability())[0]


def chosen(headdim: int, dtype: torch.dtype) -> dict[str, str]:
    """The choices in words, by kernel, such as {"forward": "128 × 64 tiles, 8 warps, 3 stages"}."""
    return {kernel: "{} × {} tiles, {} warps, {} stages".format(*choice(kernel, headdim, dtype)) for kernel in WARP}


@contextmanager
def using(kernel: str, headdim: int, dtype: torch.dtype, config: Config) -> Iterator[None]:
    """Takes a configuration for as long as the block lasts."""
    before = _tuned.get((kernel, headdim, dtype))
    _tuned[kernel, headdim, dtype] = config
    try:
        yield
    finally:
        del _tuned[kernel, headdim, dtype]
        if before is not None:
            _tuned[kernel, headdim, dtype] = before


def tune(kernel: str, headdim: int, dtype: torch.dtype, run: Callable[[], object]) -> Config:
    """Times every candidate on this GPU and keeps the fastest for all later calls. The interpreter has only one.

    Args:
        kernel, headdim, dtype: as in `candidates`.
        run: a call that uses the kernel.
    """
    if MODE.name == "interpreter":
        return INTERPRETER
    from triton.testing import do_bench

    def milliseconds(config: Config) -> float:
        with using(kernel, headdim, dtype, config):
            return do_bench(run, warmup=10, rep=40, return_mode="median")

    found = candidates(kernel, headdim, dtype, torch.cuda.get_device_capability())
    _tuned[kernel, headdim, dtype] = min(found, key=milliseconds)
    return _tuned[kernel, headdim, dtype]


# By kernel and padded headdim. Ampere, Ada and Blackwell's consumer cards: `mma.sync`, a warp multiplies alone.
WARP = {
    "forward": {
        64: [Config(128, 64, 4, 3)],
        128: [Config(128, 64, 8, 2)],
        256: [Config(64, 32, 4, 2)],
    },
    "backward_kv": {
        64: [Config(64, 64, 4, 2)],
        128: [Config(32, 64, 4, 2)],
        256: [Config(32, 32, 4, 1)],
    },
    "backward_q": {
        64: [Config(64, 64, 4, 2)],
        128: [Config(64, 32, 4, 2)],
        256: [Config(32, 32, 4, 1)],
    },
}
# Hopper and Blackwell's data-centre cards: four warps multiply together, from shared memory.
WARPGROUP = WARP

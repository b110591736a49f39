"""Tile sizes, warps and stages of the Triton kernels: a few reasoned candidates for each kind of GPU.

The first candidate that fits is used, so that a call compiles once and gives the same bits every time. `tune` times all
of them on this GPU and keeps the fastest; `chosen` lists those in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kernels.runtime import prepare
from kernels.targets import TARGETS, target_of

MODE = prepare()


class Config(NamedTuple):
    """One way to compile a kernel.

    Args:
        block_q, block_k: queries and keys in a tile.
        warps: of 32 threads, in a program. Hopper's tensor-core instruction wants them in groups of four, and 64 rows
            for each group.
        stages: tiles in shared memory at a time, one in use and the others being copied.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int

    def keywords(self) -> dict[str, int]:
        """The configuration as the keyword arguments of a launch."""
        return dict(BLOCK_Q=self.block_q, BLOCK_K=self.block_k, num_warps=self.warps, num_stages=self.stages)

    def shared_bytes(self, kernel: str, headdim: int, itemsize: int) -> int:
        """An upper bound of the shared memory that a program needs.

        The tiles that stay, of which the backward has two; those of the loop, a pair per stage, and in the backward one
        more pair for their transposes; and 2 KiB for barriers and rows.
        """
        staying, passing = (self.block_k, self.block_q) if kernel == "backward_kv" else (self.block_q, self.block_k)
        more = 0 if kernel == "forward" else staying + 2 * passing
        return (staying + 2 * self.stages * passing + more) * padded(headdim) * itemsize + 2048


def padded(headdim: int) -> int:
    """The headdim of a tile: tl.arange needs a power of two, and tl.dot at least 16."""
    return max(16, 1 << (headdim - 1).bit_length())


# In the interpreter an operation on a large tile costs little more than on a small one: large tiles, though several of
# them per sequence where heads are small. It ignores warps and stages.
INTERPRETER, INTERPRETER_WIDE = Config(128, 64, 4, 1), Config(256, 128, 4, 1)
# fp32 without TF32 uses no tensor cores, and its products are unrolled into single instructions: larger tiles spill and
# take minutes to compile. By padded headdim.
FULL_PRECISION = {64: Config(16, 16, 4, 1), 128: Config(16, 16, 4, 1), 256: Config(16, 16, 8, 1)}


def candidates(kernel: str, headdim: int, dtype: torch.dtype, target: str, window: bool = False) -> list[Config]:
    """The configurations for a kernel, the best guess first, without those that need too much shared memory.

    Args:
        kernel: "forward", "backward_kv" or "backward_q".
        headdim: of the tensors.
        dtype: fp16, bf16 or fp32.
        target: one of `kernels.targets`.
        window: whether the window has a left end.
    """
    instruction = TARGETS[target].instruction
    if dtype == torch.float32:
        configs = [FULL_PRECISION[max(64, padded(headdim))]]
    else:
        configs = CONFIGS[instruction][kernel][max(64, padded(headdim))]
        if instruction == "wgmma" and kernel != "backward_kv" and (window or headdim != padded(headdim)):
            # The masks of a window's left end and of padded dimensions need registers too.
            configs = [config._replace(block_k=config.block_k // 2) for config in configs]
    limit = TARGETS[target].shared_kib * 1024
    return [config for config in configs if config.shared_bytes(kernel, headdim, dtype.itemsize) <= limit]


_tuned: dict[tuple[str, int, torch.dtype, bool], Config] = {}


def choice(kernel: str, headdim: int, dtype: torch.dtype, window: bool = False) -> Config:
    """The configuration in use for a kernel on this machine: the tuned one, else the first candidate."""
    if (kernel, headdim, dtype, window) in _tuned:
        return _tuned[kernel, headdim, dtype, window]
    if MODE.name == "interpreter":
        return INTERPRETER if headdim < 128 else INTERPRETER_WIDE
    return candidates(kernel, headdim, dtype, this_gpu(), window)[0]


def chosen(headdim: int, dtype: torch.dtype) -> dict[str, str]:
    """The configurations in use as text, by kernel, such as {"forward": "128 × 64 tiles, 8 warps, 3 stages"}."""
    return {kernel: "{} × {} tiles, {} warps, {} stages".format(*choice(kernel, headdim, dtype)) for kernel in KERNELS}


@contextmanager
def using(kernel: str, headdim: int, dtype: torch.dtype, config: Config) -> Iterator[None]:
    """Uses a configuration inside the `with` block, with a window and without."""
    before = dict(_tuned)
    _tuned.update({(kernel, headdim, dtype, window): config for window in (False, True)})
    try:
        yield
    finally:
        _tuned.clear()
        _tuned.update(before)


def tune(kernel: str, headdim: int, dtype: torch.dtype, run: Callable[[], object]) -> Config:
    """Times every candidate on this GPU and keeps the fastest for all later calls without a window.

    In the interpreter there is only one.

    Args:
        kernel, headdim, dtype: as in `candidates`.
        run: a call that uses the kernel.
    """
    if MODE.name == "interpreter":
        return choice(kernel, headdim, dtype)
    from triton.testing import do_bench

    def milliseconds(config: Config) -> float:
        with using(kernel, headdim, dtype, config):
            return do_bench(run, warmup=10, rep=40, return_mode="median")

    found = candidates(kernel, headdim, dtype, this_gpu())
    fastest = min(found, key=milliseconds)
    _tuned[kernel, headdim, dtype, False] = fastest
    return fastest


def this_gpu() -> str:
    """The target of the GPU at hand, such as "sm_90"."""
    return target_of(torch.cuda.get_device_capability())


KERNELS = ("forward", "backward_kv", "backward_q")

# By tensor-core instruction, kernel and padded headdim. The tile that stays is as large as the registers allow
# (they hold the accumulator), the tiles of the loop as large as shared memory then allows.
# tests/kernels/test_compiling.py asserts that the first candidates spill nothing in the calls it names; `make
# compile-table` shows more. Which one is the fastest has to be measured on a GPU.
CONFIGS: dict[str, dict[str, dict[int, list[Config]]]] = {
    "mma.sync": {
        "forward": {
            64: [Config(128, 128, 8, 3), Config(128, 64, 8, 3)],
            128: [Config(128, 64, 8, 3), Config(64, 64, 4, 2)],
            256: [Config(64, 64, 8, 2), Config(64, 32, 8, 2)],
        },
        "backward_kv": {
            64: [Config(32, 64, 4, 2)],
            128: [Config(64, 64, 8, 2), Config(32, 64, 8, 2)],
            256: [Config(32, 32, 8, 2), Config(32, 32, 8, 1)],
        },
        "backward_q": {
            64: [Config(128, 64, 8, 2)],
            128: [Config(128, 32, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 4, 2)],
            256: [Config(64, 32, 8, 2), Config(32, 32, 4, 1)],
        },
    },
    "wgmma": {
        "forward": {
            64: [Config(128, 128, 8, 3), Config(128, 64, 4, 3), Config(128, 64, 8, 3)],
            128: [Config(128, 128, 8, 2), Config(128, 128, 8, 3), Config(128, 64, 8, 2)],
            256: [Config(128, 32, 8, 2), Config(64, 64, 8, 2)],
        },
        "backward_kv": {
            64: [Config(64, 128, 8, 2), Config(64, 128, 8, 1)],
            128: [Config(32, 128, 8, 2)],
            256: [Config(32, 32, 8, 2)],  # every wgmma tile spills: two accumulators of 256 columns. This is mma.sync.
        },
        "backward_q": {
            64: [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
            128: [Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 8, 2)],
            256: [Config(64, 32, 8, 2)],
        },
    },
    "tcgen05": {
        "forward": {
            64: [Config(128, 64, 4, 3), Config(128, 64, 4, 2)],
            128: [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
            256: [Config(128, 32, 8, 2), Config(64, 64, 8, 2)],
        },
        "backward_kv": {
            64: [Config(64, 128, 8, 2), Config(64, 64, 4, 2)],
            128: [Config(64, 64, 8, 2), Config(32, 128, 8, 2)],
            256: [Config(32, 64, 8, 2), Config(32, 64, 8, 1)],
        },
        "backward_q": {
            64: [Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
            128: [Config(64, 64, 8, 2), Config(128, 32, 8, 2)],
            256: [Config(64, 32, 8, 2), Config(64, 64, 8, 1)],
        },
    },
}

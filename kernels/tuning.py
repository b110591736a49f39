"""Tile sizes, warps and stages of the Triton kernels: a few reasoned candidates for each kind of GPU.

The first candidate that fits is used, so that a call compiles once and gives the same bits every time. `tune` times all
of them on this GPU and keeps the fastest for one `Kind` of call; `chosen` lists those in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """What the best tiles depend on, beside the kernel and the GPU.

    Args:
        headdim, dtype: of the tensors; fp16, bf16 or fp32.
        causal: whether queries see no keys to their right.
        window: whether the window has a left end.
        ragged: whether cu_seqlens locates the sequences.
        length: class of the sequences' length, see `length_class`.
        tma: whether tensor descriptors load the tiles, see `kernels.flash_attention.descriptors`.
    """

    headdim: int
    dtype: torch.dtype
    causal: bool = False
    window: bool = False
    ragged: bool = False
    length: str = "long"
    tma: bool = False


def length_class(seqlen_q: int, seqlen_k: int) -> str:
    """Of the longer one: "short" up to 1,024 rows, "medium" up to 4,096, else "long"."""
    longest = max(seqlen_q, seqlen_k)
    return "short" if longest <= 1024 else "medium" if longest <= 4096 else "long"


def candidates(
    kernel: str,
    headdim: int,
    dtype: torch.dtype,
    target: str,
    window: bool = False,
    *,
    ragged: bool = False,
    tma: bool = False,
) -> list[Config]:
    """The configurations for a kernel, the best guess first, without those that need too much shared memory.

    Args:
        kernel: "forward", "backward_kv" or "backward_q".
        headdim: of the tensors.
        dtype: fp16, bf16 or fp32.
        target: one of `kernels.targets`; with tma one of sm_90 or newer.
        window, ragged, tma: as in `Kind`; only the forward has descriptors, and none where there is no candidate.
    """
    instruction, width = TARGETS[target].instruction, max(64, padded(headdim))
    if dtype == torch.float32:
        configs = [FULL_PRECISION[width]]
    elif tma and kernel == "forward":
        configs = TMA_CONFIGS[instruction].get(width, [])
        if instruction == "wgmma" and width == 256 and (ragged or window):
            # V's tail passes through registers, and the window's mask needs them: beside 256 columns they would spill.
            configs = [config for config in configs if config.block_k <= 32]
    else:
        configs = CONFIGS[instruction][kernel][width]
        more = window or headdim != padded(headdim) or (ragged and kernel == "forward" and width == 128)
        if instruction == "wgmma" and kernel != "backward_kv" and more:
            # Masks of a window's left end and of padded dimensions need registers too, and so do looked-up sequences.
            configs = [config._replace(block_k=config.block_k // 2) for config in configs]
    limit = TARGETS[target].shared_kib * 1024
    fitting = (config for config in configs if config.shared_bytes(kernel, headdim, dtype.itemsize) <= limit)
    return list(dict.fromkeys(fitting))


_tuned: dict[tuple[str, Kind], Config] = {}
_in_use: dict[tuple[str, int, torch.dtype], Config] = {}  # inside `using`, for every kind of call
_asked: dict[str, Kind] = {}  # the last kind of call, by kernel


def choice(kernel: str, kind: Kind) -> Config:
    """The configuration in use for a kernel on this machine: the tuned one, else the first candidate."""
    _asked[kernel] = kind
    if _in_use and (kernel, kind.headdim, kind.dtype) in _in_use:
        return _in_use[kernel, kind.headdim, kind.dtype]
    if (kernel, kind) in _tuned:
        return _tuned[kernel, kind]
    if MODE.name == "interpreter":
        return INTERPRETER if kind.headdim < 128 else INTERPRETER_WIDE
    return _candidates(kernel, kind, this_gpu())[0]


@lru_cache(maxsize=1024)
def _candidates(kernel: str, kind: Kind, target: str) -> list[Config]:
    return candidates(kernel, kind.headdim, kind.dtype, target, kind.window, ragged=kind.ragged, tma=kind.tma)


def chosen(headdim: int, dtype: torch.dtype, **kind: Any) -> dict[str, str]:
    """The configurations in use as text, by kernel, such as {"forward": "128 × 64 tiles, 8 warps, 3 stages"}.

    Args:
        headdim, dtype: of the tensors.
        kind: what else is known of the calls, as in `Kind`: causal=True, length="short". `tma` holds for the forward.
    """
    text = {}
    for kernel in KERNELS:
        whole = Kind(headdim, dtype, **kind)
        config = choice(kernel, whole if kernel == "forward" else whole._replace(tma=False))
        text[kernel] = "{} × {} tiles, {} warps, {} stages".format(*config)
        if kernel == "forward" and whole.tma:
            text[kernel] += ", descriptors"
    return text


@contextmanager
def using(kernel: str, headdim: int, dtype: torch.dtype, config: Config) -> Iterator[None]:
    """Uses a configuration inside the `with` block, for every kind of call: any mask, any length."""
    before = dict(_in_use)
    _in_use[kernel, headdim, dtype] = config
    try:
        yield
    finally:
        _in_use.clear()
        _in_use.update(before)


def tune(kernel: str, headdim: int, dtype: torch.dtype, run: Callable[[], object]) -> Config:
    """Times every candidate on this GPU and keeps the fastest for all later calls of the same `Kind` as this one.

    In the interpreter there is only one. A candidate that fails is left out; if all fail, the last error is raised.

    Args:
        kernel: as in `candidates`.
        headdim, dtype: of the tensors in `run`.
        run: a call that uses the kernel. Its mask, its lengths and its tensors say for which kind of call it is.

    Raises:
        ValueError: where `run` does not use the kernel with this headdim and dtype.
    """
    if MODE.name == "interpreter":
        return choice(kernel, Kind(headdim, dtype))
    _asked.pop(kernel, None)
    run()
    kind = _asked.get(kernel)
    if kind is None or (kind.headdim, kind.dtype) != (headdim, dtype):
        raise ValueError(f"run does not use {kernel} with headdim {headdim} in {dtype}: it asked for {kind}")
    fastest = _fastest(kernel, kind, run)
    _tuned[kernel, kind] = fastest
    return fastest


def _fastest(kernel: str, kind: Kind, run: Callable[[], object]) -> Config:
    times, failure = {}, RuntimeError(f"no candidate for {kernel}, {kind}")
    for config in _candidates(kernel, kind, this_gpu()):
        try:
            with using(kernel, kind.headdim, kind.dtype, config):
                times[config] = _milliseconds(run)
        except Exception as error:  # the compiler and the launch each raise their own
            failure = RuntimeError(f"{kernel} with {config} fails: {error}")
            failure.__cause__ = error
    if not times:
        raise failure
    return min(times, key=times.__getitem__)


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=10, rep=40, return_mode="median")


def this_gpu() -> str:
    """The target of the current CUDA device, such as "sm_90"."""
    return _target(torch.cuda.current_device())


@lru_cache
def _target(device: int) -> str:
    return target_of(torch.cuda.get_device_capability(device))


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
            128: [Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 8, 3)],
            256: [Config(128, 32, 8, 2), Config(64, 64, 8, 2)],  # a third stage spills
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
            128: [Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 2)],
            256: [Config(128, 32, 8, 3), Config(128, 32, 8, 2), Config(64, 64, 8, 2)],
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

# The forward with tensor descriptors: no addresses in registers, so larger tiles and more stages fit. Three stages
# where they fit: with two, a tile of keys is copied during one of the two products only.
TMA_CONFIGS: dict[str, dict[int, list[Config]]] = {
    "mma.sync": {  # of these GPUs only sm_120 has descriptors; at 256 all tiles spill
        64: [Config(128, 64, 8, 3), Config(128, 64, 8, 2)],
        128: [Config(128, 64, 8, 2), Config(128, 32, 8, 3)],
    },
    "wgmma": {
        64: [Config(128, 128, 8, 3), Config(64, 128, 4, 3), Config(128, 64, 8, 4)],
        128: [Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(128, 64, 8, 4)],
        256: [Config(128, 64, 8, 2), Config(128, 32, 8, 3)],
    },
    "tcgen05": {
        64: [Config(128, 128, 8, 3), Config(128, 64, 4, 3)],
        128: [Config(128, 128, 8, 3), Config(128, 64, 8, 3)],
        256: [Config(128, 64, 8, 2), Config(128, 32, 8, 3)],
    },
}

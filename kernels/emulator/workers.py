"""`gl.warp_specialize`: which workers a block can have, and the names of its partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernels.emulator.scheduler import current
from kernels.emulator.values import Value, bad_layout

FEWEST_REGISTERS, MOST_REGISTERS = 24, 256  # of a thread, in steps of 8: what setmaxnreg takes
SM_REGISTERS = 65536


def warp_specialize(
    functions_and_args: list, worker_num_warps: list[int], worker_num_regs: list[int] | None = None
) -> Any:
    """Runs the first function by the current warps and each other one by warps of its own, concurrently."""
    me, parts = current(), functions_and_args
    if len(me.program.partitions) > 1:
        raise bad_layout("warp_specialize inside warp_specialize")
    if any(warps & (warps - 1) for warps in worker_num_warps):
        raise bad_layout(f"workers of {worker_num_warps} warps", "each wants a power of two")
    if len(worker_num_warps) != len(parts) - 1 or len(worker_num_regs or worker_num_warps) != len(parts) - 1:
        raise bad_layout(f"{len(parts) - 1} workers, {len(worker_num_warps)} numbers of warps, and {worker_num_regs}")
    for function, arguments in parts[1:]:
        if any(isinstance(x, Value) and x.shape for x in _flat(arguments)):
            raise bad_layout(f"{function.__name__} gets a tensor in registers, which only the first partition can take")
    if worker_num_regs:
        _check_registers(me.num_warps, worker_num_warps, worker_num_regs)
    warps = [me.num_warps, *worker_num_warps]
    return me.program.specialize(
        [
            (name, n, _call(*part))
            for name, n, part in zip(_numbered([f.__name__ for f, _ in parts]), warps, parts, strict=True)
        ]
    )


def _numbered(names: list[str]) -> list[str]:
    """Names of partitions: those that share a function get numbers, `consume 0` and `consume 1`."""
    return [f"{name} {names[:i].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _call(function: Callable, arguments: tuple) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _flat(x: Any) -> list:
    return [leaf for item in x for leaf in _flat(item)] if isinstance(x, tuple | list) else [x]


def _check_registers(num_warps: int, worker_num_warps: list[int], worker_num_regs: list[int]) -> None:
    """Registers are allocated per warpgroup of 4 warps; the first partition gets what the workers leave."""
    for registers in worker_num_regs:
        if registers % 8 or not FEWEST_REGISTERS <= registers <= MOST_REGISTERS:
            raise bad_layout(f"{registers} registers for a worker", "setmaxnreg takes 24 to 256, in steps of 8")
    taken = sum(-(-warps // 4) * 128 * regs for warps, regs in zip(worker_num_warps, worker_num_regs, strict=True))
    left = (SM_REGISTERS - taken) // (num_warps * 32) // 8 * 8
    if left < FEWEST_REGISTERS:
        raise bad_layout(f"the workers take {taken} of {SM_REGISTERS} registers and leave {left} a thread for the rest")

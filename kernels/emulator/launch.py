"""Runs a Gluon kernel's own Python code: the same code object, with the emulator's functions in its globals."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.emulator import language
from kernels.emulator.reports import EMULATED, NotModelled, Place, Race, Report
from kernels.emulator.scheduler import Program
from kernels.emulator.units import Descriptor
from kernels.emulator.values import pointer_to, scalar


@dataclass(frozen=True)
class Run:
    """What a launch did.

    Args:
        programs: blocks of threads, per interleaving.
        interleavings: how often each ran: once, and `explore` times more.
        different: the number of distinct orders among them.
    """

    programs: int
    interleavings: int
    different: int


def emulate(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, explore: int = 0, seed: int = 0, **named: Any
) -> Run:
    """Runs a kernel on CPU tensors, program by program. The tensors hold the results, as after a launch.

    Args:
        kernel: a `@gluon.jit` function.
        grid: programs along up to three axes.
        args, named: as the kernel takes them: CPU tensors, `TensorDescriptor`s of CPU tensors, numbers.
        num_warps: of the whole block, or of the first partition; a kernel's parameter of that name gets it too.
        explore: how many other interleavings to run, after the plain one.
        seed: of those interleavings: the same seed gives the same ones.

    Raises:
        Report: a fault in the kernel: `Race`, `Deadlock`, `MissingFence` and others. A result that differs in another
            interleaving is a `Race` too.
        NotModelled: where the kernel uses what the emulator does not model.
        TypeError: where the kernel is no `@gluon.jit` function, or the arguments do not fit it.

    Example:
        >>> from triton.experimental.gluon import language as gl
        >>> from kernels.emulator.example import double_kernel
        >>> x = torch.ones(32, 64, dtype=torch.float16)
        >>> layout = gl.NVMMASharedLayout.get_default_for([32, 64], gl.float16)
        >>> blocks = [TensorDescriptor.from_tensor(y, [32, 64], layout) for y in (x, torch.zeros_like(x))]
        >>> emulate(double_kernel, (1,), *blocks, FENCED=True, explore=5)
        Run(programs=1, interleavings=6, different=5)
    """
    if not isinstance(kernel, GluonJITFunction):
        raise TypeError(f"kernel is {type(kernel).__name__}, wants a function decorated with @gluon.jit")
    named.pop("maxnreg", None)  # a limit for the compiler
    if "num_warps" in kernel.arg_names:
        named["num_warps"] = num_warps
    bound = inspect.signature(kernel.fn).bind(*args, **named)
    bound.apply_defaults()
    constant = {parameter.name: parameter.is_constexpr for parameter in kernel.params}
    arguments = [value if constant[name] else _argument(name, value) for name, value in bound.arguments.items()]
    body = functools.partial(_Translator().function(kernel), *arguments)
    full_grid = (*grid, 1, 1)[:3]
    memories = [memory for name, value in bound.arguments.items() for memory in _memories(name, value)]
    before = [memory.clone() for _, memory in memories]
    orders = {_run_grid(body, full_grid, num_warps, 0, seed)}
    plain = [memory.clone() for _, memory in memories]
    for number in range(1, explore + 1):
        for (_, memory), content in zip(memories, before, strict=True):
            memory.copy_(content)
        orders.add(_run_grid(body, full_grid, num_warps, number, seed))
        for (name, memory), content in zip(memories, plain, strict=True):
            _check_same(name, memory, content, f"in interleaving {number}, seed {seed}")
    return Run(math.prod(full_grid), explore + 1, len(orders))


def _run_grid(body: Callable, grid: tuple[int, ...], num_warps: int, number: int, seed: int) -> tuple[int, ...]:
    """Runs every program in one interleaving; returns the scheduler's choices."""
    choices: list[int] = []
    for place in itertools.product(*(range(size) for size in reversed(grid))):
        program = Program(place[::-1], grid, num_warps, None if number == 0 else f"{seed} {number}")
        try:
            program.run(body)
        except Report as report:
            report.add_note(f"in program {place[::-1]} of {grid}, interleaving {number}, seed {seed}")
            raise
        except (AttributeError, TypeError) as error:
            _refuse_line(error)
            raise
        choices += [*program.choices, -1]
    return tuple(choices)


def _refuse_line(error: Exception) -> None:
    """Raises NotModelled where a line of the kernel itself failed: it used what the emulator does not have."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    if EMULATED in frame.f_globals:
        place = Place(((frame.f_code.co_filename, line, frame.f_code.co_name),))
        raise NotModelled(f"the emulator does not know this: {error}\n  {place}: {place.code}") from error


def _memories(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """The memory of an argument's tensors, with the argument's name."""
    if isinstance(value, tuple):
        return [memory for item in value for memory in _memories(name, item)]
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    return [(name, pointer_to(tensor, name).memory)] if isinstance(tensor, torch.Tensor) else []


def _check_same(name: str, memory: torch.Tensor, plain: torch.Tensor, where: str) -> None:
    """Bit by bit: raises Race where a tensor does not end as in the plain order."""
    different = (memory.view(torch.uint8) != plain.view(torch.uint8)).nonzero()
    if len(different):
        element = int(different[0]) // memory.element_size()
        cure = "two operations touch this memory, one writes, and nothing orders them"
        report = Race(f"{name} does not end as in the plain order, from element {element} on", [], cure)
        report.add_note(where)
        raise report


def _argument(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{name} is on {value.device}, and the emulator takes CPU tensors")
        return pointer_to(value, name)
    if isinstance(value, TensorDescriptor):
        tensor = value.base.as_strided(tuple(value.shape), tuple(value.strides))
        padding = torch.nan if value.padding == "nan" else 0.0
        return Descriptor(tensor, list(value.block_shape), value.layout, padding, name)
    if isinstance(value, tuple):
        return tuple(_argument(name, item) for item in value)
    if isinstance(value, int | float):
        return scalar(value)
    if value is None:
        return None
    raise TypeError(f"{name} is {type(value).__name__}, and the emulator takes tensors, descriptors and numbers")


class _Translator:
    """Copies jit functions with Gluon's functions replaced by the emulator's, and those that they call as well."""

    def __init__(self) -> None:
        self.done: dict[Any, Callable] = {}

    def function(self, kernel: Any) -> Callable:
        if kernel not in self.done:
            function = kernel.fn
            names: dict[str, Any] = {EMULATED: True, "range": language.kernel_range}
            copy = types.FunctionType(
                function.__code__, names, function.__name__, function.__defaults__, function.__closure__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            self.done[kernel] = copy
            for name in _names(function.__code__):
                if name in function.__globals__:
                    names[name] = self.replacement(function.__globals__[name])
        return self.done[kernel]

    def replacement(self, value: Any) -> Any:
        """The replacement of a global of a kernel: the emulator's for a function of Gluon, anything else unchanged."""
        if isinstance(value, types.ModuleType):
            return _module(value.__name__) or _Module(value, self)
        if type(value).__name__ == "constexpr":
            return value.value
        origin = getattr(value, "__module__", "") or ""
        if isinstance(value, GluonJITFunction):
            origin = value.fn.__module__
            if origin.split(".")[0] != "triton":
                return self.function(value)
        if getattr(value, "__triton_aggregate__", False):
            return _Refused(f"the emulator does not know @aggregate, which makes {value.__name__}")
        is_gluon = getattr(value, "__triton_builtin__", False) or isinstance(value, GluonJITFunction)
        if is_gluon and origin.split(".")[0] == "triton":
            name = getattr(value, "__name__", "") or value.fn.__name__
            return _stub(_module(origin) or language.gl, name)
        return value


class _Module:
    """A module of the kernel's author: its functions are translated when they are accessed."""

    def __init__(self, module: types.ModuleType, translator: _Translator):
        self._module, self._translator = module, translator

    def __getattr__(self, name: str) -> Any:
        return self._translator.replacement(getattr(self._module, name))


def _names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _module(name: str) -> language.Namespace | None:
    if not name.startswith("triton."):
        return None
    last = name.rsplit(".", 1)[-1]
    known = {"mbarrier": language.mbarrier, "tma": language.tma, "hopper": language.hopper}
    if last in known:
        return known[last]
    return language.Namespace(last, {}) if ".nvidia." in name or ".amd." in name else language.gl


def _stub(namespace: language.Namespace, name: str) -> Any:
    try:
        return getattr(namespace, name)
    except NotModelled as unknown:
        return _Refused(str(unknown))


class _Refused:
    """Replaces what the emulator does not know: its use raises NotModelled, at the line that uses it."""

    def __init__(self, message: str):
        self._message = message

    def __call__(self, *_: Any, **__: Any) -> None:
        raise NotModelled(self._message)

    def __getattr__(self, name: str) -> Any:
        raise NotModelled(self._message)

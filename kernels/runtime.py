"""Where Triton kernels run on this machine (GPU or interpreter) and why; and a self-test of each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from kernels.targets import target_of

if TYPE_CHECKING:
    from triton.runtime.interpreter import InterpretedFunction

COMPILE_ONLY = "KERNELS_COMPILE_ONLY"  # set by `kernels.compiling` for its child process


@dataclass(frozen=True)
class TritonMode:
    """Where a kernel runs: "gpu", "interpreter" (on the CPU, slowly) or "none"; and the reason."""

    name: Literal["gpu", "interpreter", "none"]
    reason: str


def triton_mode() -> TritonMode:
    """Decides where Triton kernels run. Imports no kernel, so that TRITON_INTERPRET can still be set afterwards."""
    if importlib.util.find_spec("triton") is None:
        return TritonMode("none", "Triton is not installed; it is made for Linux (on Windows: WSL)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return TritonMode("interpreter", "TRITON_INTERPRET=1 is set")
    if not torch.cuda.is_available():
        return TritonMode("interpreter", "no CUDA device")
    capability = torch.cuda.get_device_capability()
    try:
        target_of(capability)
    except ValueError as error:
        return TritonMode("interpreter", f"the GPU is none that the kernels know: {error}")
    return TritonMode("gpu", "{}, sm_{}{}".format(torch.cuda.get_device_name(), *capability))


_prepared: list[TritonMode] = []  # and no functools.cache: torch.compile would trace into the cached function


def prepare() -> TritonMode:
    """Makes `@triton.jit` compile or interpret, as `triton_mode` decides. Call it before the first kernel is decorated.

    Returns:
        The mode, decided once for the process.
    """
    if not _prepared:
        _prepared.append(_prepare())
    return _prepared[0]


def _prepare() -> TritonMode:
    if os.environ.get(COMPILE_ONLY) == "1":
        return TritonMode("none", "this process compiles kernels for other machines, and runs none")
    mode = triton_mode()
    if mode.name == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read whenever a kernel is decorated
        if "triton.language" in sys.modules:  # torch.library imports it, so this is the usual case
            _interpret_standard_library()
    return mode


def _interpret_standard_library() -> None:
    """tl.zeros, tl.sum and others are jit functions too, decorated to compile if Triton was imported before."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def method(function: InterpretedFunction):
        return lambda *args, **kwargs: function(*args, **kwargs)  # a function binds `self`, the object does not

    modules = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    for place in (*modules, tl.tensor):
        for name, value in list(vars(place).items()):
            if isinstance(value, JITFunction):
                function = InterpretedFunction(value.fn)
                setattr(place, name, method(function) if place is tl.tensor else function)


@dataclass(frozen=True)
class SelfTest:
    """The result of a small matmul.

    Args:
        ratios: for each precision the largest error over its budget; at most 1 is right, NaN is not.
        failure: the last line of the error if it did not run.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def right(self) -> list[str]:
        """The precisions within their error budget."""
        return [name for name, ratio in self.ratios.items() if ratio <= 1]

    @property
    def wrong(self) -> list[str]:
        """The precisions over their error budget."""
        return [name for name in self.ratios if name not in self.right]

    def summary(self) -> str:
        """One line, such as: right in fp32, fp16; WRONG in bf16 (7e+10 times the error budget)."""
        if self.failure:
            return f"does not run: {self.failure}"
        parts = [f"right in {', '.join(self.right)}"] if self.right else []
        parts += [f"WRONG in {name} ({self.ratios[name]:.0e} times the error budget)" for name in self.wrong]
        return "; ".join(parts)


def self_test(mode: Literal["gpu", "interpreter"], timeout: float = 60.0) -> SelfTest:
    """Runs `kernels.self_test` in a child process: about a second, and the imports.

    Args:
        mode: "gpu", or "interpreter", whose bf16 is silently wrong: it stores bf16 as uint16 and multiplies integers.
        timeout: seconds.

    Returns:
        The errors, or the failure.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if mode == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "kernels.self_test", "cuda" if mode == "gpu" else "cpu"]
    root = Path(__file__).resolve().parent.parent
    try:
        child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return SelfTest(failure=f"no answer in {timeout:.0f} s")
    if child.returncode:
        return SelfTest(failure=(child.stderr.strip().splitlines() or ["no message"])[-1])
    return SelfTest(json.loads(child.stdout.splitlines()[-1]))

"""What a call costs the host: the time from Python to a launch. The launch itself is left out, so no GPU is needed.

    python -m benchmarks.host

A GPU waits for the host wherever a kernel is shorter than this. The yardstick is a `torch.library.custom_op` that does
nothing but make the same outputs, measured in turns with the calls.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from kernels.flash_attention import call, flash_attention
from kernels.flash_attention.descriptors import using_descriptors
from kernels.hopper import launch as hopper

KERNELS = ("forward_kernel", "delta_kernel", "backward_kv_kernel", "backward_q_kernel")
SHAPE = (1, 256, 8, 128)
ROUNDS, CALLS = 40, 50  # the shortest of the rounds is what the others would be on a quiet machine


class Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: None


@contextlib.contextmanager
def no_launch() -> Iterator[None]:
    """Inside the `with` block no kernel of flash_attention or of the Hopper ladder is launched."""
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(mock.patch.object(call, name, Nothing()))
        rungs = dict.fromkeys(hopper.RUNGS, SimpleNamespace(forward=Nothing()))
        stack.enter_context(mock.patch.object(hopper, "RUNGS", rungs))
        stack.enter_context(mock.patch.object(hopper, "emulate", lambda *args, **named: None))
        yield


@torch.library.custom_op("benchmarks::empty_attention", mutates_args=())
def empty_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """The outputs of attention, empty."""
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


empty_attention.register_autograd(lambda ctx, *grads: (None,) * 11, setup_context=lambda ctx, inputs, output: None)


def host_times(rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds of a call, the shortest of `rounds` in turns, by what is called."""
    q, k, v = (torch.zeros(SHAPE, dtype=torch.float16) for _ in range(3))
    a, b, c = leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    numbers = (None, None, SHAPE[1], SHAPE[1], 0.1, -1, 0, 0.0)
    with no_launch():
        out = flash_attention(a, b, c, causal=True)[0]
        calls: dict[str, Callable[[], object]] = {
            "empty custom_op": partial(empty_attention, q, k, v, *numbers),
            "empty custom_op, with grad": partial(empty_attention, *leaves, *numbers),
            "forward": partial(flash_attention, q, k, v, causal=True),
            "forward, descriptors": partial(_described, q, k, v),
            "forward, with grad": partial(flash_attention, a, b, c, causal=True),
            "backward": partial(torch.autograd.grad, out, leaves, torch.zeros_like(out), retain_graph=True),
            "hopper": partial(hopper.attention, q, k, v, causal=True),
        }
        times = dict.fromkeys(calls, float("inf"))
        for _ in range(rounds):
            for name, run in calls.items():
                times[name] = min(times[name], _microseconds(run))
    return times


def _described(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with using_descriptors():
        return flash_attention(q, k, v, causal=True)


def _microseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    for name, microseconds in host_times().items():
        print(f"{name:28} {microseconds:6.1f} µs")


if __name__ == "__main__":
    main()

"""Attention kernels beside other libraries: as many queries as keys, 16k tokens, hidden size 2048, bf16.

A suite calls `compare`. `PEERS` are the back ends of torch; flash-attn, FlashAttention-3 and FlashInfer are added where
they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.correctness import random_qkv
from benchmarks.machine import Machine, Unable
from benchmarks.timing import Timing

TOKENS, HIDDEN = 16384, 2048
DRY_RUN = (1, 32, 2)  # batch, seqlen, nheads
SEQLENS = (16384, 8192, 4096, 2048, 1024, 512)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (batch, seqlen, nheads, headdim), out like q

LOOPS = {"FlashInfer"}  # a launch for each sequence, while the others have one for the batch
PEERS = {
    "torch FLASH": SDPBackend.FLASH_ATTENTION,  # FlashAttention-2
    "torch EFFICIENT": SDPBackend.EFFICIENT_ATTENTION,
    "torch CUDNN": SDPBackend.CUDNN_ATTENTION,
}


def compare(
    machine: Machine, ours: dict[str, Attention], headdim: int, causal: bool, seqlen: int, *, backward: bool = False
) -> Iterator[dict]:
    """A row of figures for the forward, and one for the backward if `backward`.

    Args:
        machine: where. A dry run takes 32 tokens and two heads, whatever `seqlen` says.
        ours: by name; the ratios are the first one over each of the others.
        headdim, causal, seqlen: of the case; batch and heads follow from 16k tokens and hidden size 2048.

    Yields:
        The case; TFLOP/s by name; ratios; the first one's shares of the measured matmul peak and copy bandwidth;
        milliseconds by name; the GPU's clock and power meanwhile; and the reason where a peer cannot run the case.
        Where the GPU had to wait for the host, and where a peer takes a call for each sequence, the row names it.
    """
    batch, seqlen, nheads = DRY_RUN if machine.dry_run else (TOKENS // seqlen, seqlen, HIDDEN // headdim)
    dtype = torch.float16 if machine.dry_run else torch.bfloat16
    qkv = random_qkv((seqlen, seqlen), (nheads, nheads), headdim, dtype, machine.device, batch)
    functions = ours | peers(machine, causal)
    flops = 4 * batch * nheads * seqlen**2 * headdim / (2 if causal else 1)
    case = {"headdim": headdim, "causal": causal, "seqlen": seqlen, "batch": batch, "nheads": nheads}

    def row(direction: str, made: Mapping[str, Callable[[], Callable[[], object]]], work: float, moved: int) -> dict:
        calls, unable = able(machine, f"{direction}, {case}", made, ours)
        figures = _figures(machine, machine.time(calls), work, moved)
        if looping := sorted(LOOPS & calls.keys()) if batch > 1 else []:
            figures["a call for each sequence"] = ", ".join(looping)
        return {"direction": direction, **case, **figures, "unable": unable}

    made = {name: partial(_forward, function, qkv) for name, function in functions.items()}
    yield row("forward", made, flops, moved=4 * qkv[0].nbytes)
    if backward:
        grad_out = torch.randn_like(qkv[0])
        made = {name: partial(_graph, function, qkv, grad_out) for name, function in functions.items()}
        yield row("backward", made, 2.5 * flops, moved=8 * qkv[0].nbytes)


def able(
    machine: Machine,
    case: str,
    made: Mapping[str, Callable[[], Callable[[], object]]],
    ours: Mapping[str, Attention],
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Makes and tries each call. A peer that fails at this size or architecture is left out, and its error is kept."""
    calls, unable = {}, {}
    for name, make in made.items():
        if name in ours:
            calls[name] = make()
            calls[name]()
            continue
        try:
            calls[name] = machine.attempt(f"{name}, {case}", partial(_made_and_called, make))
        except Unable as error:
            unable[name] = str(error)
    return calls, unable


def _made_and_called(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    call = make()
    call()
    return call


def _forward(function: Attention, qkv: list[Tensor]) -> Callable[[], object]:
    return partial(function, *qkv)


def _graph(function: Attention, qkv: list[Tensor], grad_out: Tensor) -> Callable[[], object]:
    """The backward alone: the forward runs once, here, and its graph is kept."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    return partial(torch.autograd.grad, function(*leaves), leaves, grad_out, retain_graph=True)


def _figures(machine: Machine, timings: dict[str, Timing], flops: float, moved: int) -> dict[str, Any]:
    rates = {name: flops / timing.median / 1e9 for name, timing in timings.items()}
    first, *others = rates
    seconds = timings[first].median / 1000
    late = ", ".join(name for name, timing in timings.items() if 2 * timing.late > timing.rounds)
    state = machine.state  # the two ceilings below are timed too
    return {
        **{f"{name} TFLOP/s": rate for name, rate in rates.items()},
        **{f"{first} / {name}": rates[first] / rates[name] for name in others},
        "share of matmul peak": flops / seconds / machine.peak_flops,
        "share of copy bandwidth": moved / seconds / machine.peak_bandwidth,
        **({"the GPU waited for the host in": late} if late else {}),
        "milliseconds": {name: asdict(timing) for name, timing in timings.items()},
        "gpu": state,
    }


def peers(machine: Machine, causal: bool) -> dict[str, Attention]:
    """The attention of other libraries that are installed, by name; on a CPU that of torch alone."""
    if machine.dry_run:
        return {"torch CPU": partial(_torch, None, causal)}
    found: dict[str, Attention] = {name: partial(_torch, backend, causal) for name, backend in PEERS.items()}
    for name, module in (("flash-attn", "flash_attn"), ("FlashAttention-3", "flash_attn_interface")):
        if function := _attribute(module, "flash_attn_func"):
            found[name] = partial(_flash_attn, function, causal)
    if function := _attribute("flashinfer", "single_prefill_with_kv_cache"):
        found["FlashInfer"] = partial(_flashinfer, function, causal)
    return found


def _torch(backend: SDPBackend | None, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(list(PEERS.values()) + [SDPBackend.MATH] if backend is None else backend):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal).transpose(1, 2)


def _flash_attn(function: Callable, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    result = function(q, k, v, causal=causal)
    return result[0] if isinstance(result, tuple) else result  # early versions of FlashAttention-3 also return the lse


def _flashinfer(function: Callable, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([function(*sequence, causal=causal) for sequence in zip(q, k, v, strict=True)])


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # not installed, or built for another torch: its loader may raise any type
        return None

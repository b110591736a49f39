"""Compiled kernels as a table: a line each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from kernels.compiling.compile import compile_kernels
from kernels.compiling.job import Compiled, Job


def lines(families: Mapping[str, Callable[[str], dict[str, Job]]], targets: Iterable[str]) -> Iterator[str]:
    """Compiles every job of every family for every target, and yields the table line by line.

    Args:
        families: by name, a function (target) -> {name: job}.
        targets: of `kernels.targets`.
    """
    for target in targets:
        for family, jobs_for in families.items():
            jobs = jobs_for(target)
            for (name, job), compiled in zip(jobs.items(), compile_kernels(jobs.values()), strict=True):
                yield f"{target:7} {family:16} {name:42} {line(job, compiled)}"


def line(job: Job, compiled: Compiled) -> str:
    """A compiled kernel in one line, or why it does not compile."""
    if compiled.failure:
        return compiled.failure
    instructions = ", ".join(f"{count} {kind}" for kind, count in compiled.instructions.items()) or "no tensor core"
    spilled = f", {compiled.spilled_bytes} B spilled" if compiled.spilled_bytes else ""
    return (
        f"{instructions:14} {compiled.async_copies:3} async copies  {compiled.registers:3} registers{spilled}  "
        f"{compiled.shared_bytes // 1024:3} KiB shared  occupancy {compiled.occupancy(job):.0%}"
    )

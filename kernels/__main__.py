"""`make compile-table`: every kernel in the configuration that each kind of GPU gets, compiled without a GPU.

    python -m kernels [sm_90 …]

A new family of kernels joins with a function (target) -> {name: Job} in `FAMILIES`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from kernels.compiling.job import Job
from kernels.compiling.table import lines
from kernels.flash_attention.jobs import flash_attention_jobs, hard_jobs
from kernels.hopper.jobs import hopper_jobs
from kernels.targets import TARGETS

FAMILIES: dict[str, Callable[[str], dict[str, Job]]] = {
    "flash_attention": flash_attention_jobs,
    "flash_attention*": hard_jobs,
    "hopper": hopper_jobs,
}


def main() -> None:
    """Prints the table, for the targets that are named or for all."""
    print(
        "sm_75 (T4) and older: not supported, no tensor-core instruction for our tiles. PyTorch's attention runs there"
    )
    for line in lines(FAMILIES, sys.argv[1:] or TARGETS):
        print(line, flush=True)


if __name__ == "__main__":
    main()

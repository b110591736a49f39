"""Compile a kernel for any GPU, without one, and read what the compiler made of it.

| file | content |
|---|---|
| `job.py` | `Job`, one compilation, and `Compiled`, its result |
| `compile.py` | `compile_kernels`: jobs to results, in a child process, cached |
| `listing.py` | instructions counted in the PTX, registers and spills read from the cubin |
| `table.py` | results as lines of text |

Each family of kernels lists its own jobs (`kernels/flash_attention/jobs.py`, `kernels/hopper/jobs.py`), and
`python -m kernels` compiles them all.
"""

from kernels.compiling.compile import compile_kernels
from kernels.compiling.job import Compiled, Job
from kernels.compiling.listing import HOPPER
from kernels.compiling.table import line

__all__ = ["HOPPER", "Compiled", "Job", "compile_kernels", "line"]

"""`python -m kernels.hopper`: every rung run on this CPU, by the emulator, then what each compiles to, as a table.

No GPU is needed for either.
"""

from __future__ import annotations

import io
import json
import time
import tokenize
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch

from kernels.compiling import HOPPER, compile_kernels
from kernels.hopper.jobs import rung_jobs
from kernels.hopper.launch import RUNGS, attention

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def show_attention() -> None:
    """Runs every rung in the emulator, and prints its time and its error."""
    q, k, v = torch.randn(3, 1, 256, 1, 64).bfloat16()
    exact = torch.softmax((q[0, :, 0] @ k[0, :, 0].T).double() / 8, -1) @ v[0, :, 0].double()
    for rung in RUNGS:
        start = time.perf_counter()
        result, _ = attention(q, k, v, rung=rung)
        seconds = time.perf_counter() - start
        error = (result[0, :, 0].double() - exact).abs().max()
        print(f"attention of 256 tokens by {rung}: {seconds:.2f} s, largest difference from float64 {error:.0e}")


def table() -> str:
    """The ladder in Markdown: bf16, causal, tiles of 128 × 128, two slots."""
    rows = [("rung", "lines", "d", *(f"`{name}`" for name in HOPPER), "registers", "spilled", "shared", "TFLOPS")]
    rows.append(("---",) * len(rows[0]))
    jobs = rung_jobs()
    for (rung, headdim), compiled in zip(jobs, compile_kernels(jobs.values()), strict=True):
        module = RUNGS[rung]
        figures = [count_lines(module), headdim, *(compiled.hopper[name] for name in HOPPER)]
        figures += [compiled.registers, compiled.spilled_bytes]
        name = f"`{module.__name__.split('.')[-1]}.py`"
        rows.append((name, *map(str, figures), f"{compiled.shared_bytes:,} B", measured(rung, headdim)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measured(rung: str, headdim: int, results: Path = RESULTS) -> str:
    """TFLOP/s of the longest causal forward that `make bench-gpu` stored, with its GPU, or "not measured yet"."""
    found = []
    for path in sorted(results.glob("*/hopper.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            if row["headdim"] == headdim and row["causal"]:
                found.append((row["seqlen"], f"{row[f'{rung} TFLOP/s']:.0f} ({result['machine']['device']})"))
    return max(found)[1] if found else "not measured yet"


def count_lines(module: ModuleType) -> int:
    """Lines of code: no blanks, comments or docstrings."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.type == tokenize.STRING and previous in skipped
        if token.type not in skipped and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return len(lines)


if __name__ == "__main__":
    show_attention()
    print(f"\ntriton {version('triton')}, sm_90a\n\n{table()}")

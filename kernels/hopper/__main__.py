"""`python -m kernels.hopper`: what each rung compiles to, as a table. Compiles for Hopper; no GPU is needed."""

from __future__ import annotations

import io
import json
import tokenize
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from kernels.hopper.compiled import rung_jobs
from kernels.hopper.launch import RUNGS
from kernels.inspection import HOPPER, ROOT, inspect

RESULTS = ROOT / "benchmarks" / "results"


def table() -> str:
    """The ladder in Markdown: bf16, causal, tiles of 128 × 128, two slots."""
    rows = [("rung", "lines", "d", *(f"`{name}`" for name in HOPPER), "registers", "spilled", "shared", "TFLOPS")]
    rows.append(("---",) * len(rows[0]))
    jobs = rung_jobs()
    for (rung, headdim), report in zip(jobs, inspect(jobs.values()), strict=True):
        module = RUNGS[rung]
        figures = [count_lines(module), headdim, *(report.hopper[name] for name in HOPPER)]
        figures += [report.registers, report.spilled_bytes]
        name = f"`{module.__name__.split('.')[-1]}.py`"
        rows.append((name, *map(str, figures), f"{report.shared_bytes:,} B", measured(rung, headdim)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def measured(rung: str, headdim: int, results: Path = RESULTS) -> str:
    """TFLOP/s of the longest causal forward that `make bench-gpu` stored, with its GPU; or that there is none."""
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
    print(f"triton {version('triton')}, sm_90a\n\n{table()}")

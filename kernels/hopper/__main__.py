"""`python -m kernels.hopper`: what each rung compiles to, as a table. Compiles for Hopper; no GPU is needed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import torch
import triton

from kernels.hopper.compiled import INSTRUCTIONS, Compiled, compile_for_hopper
from kernels.hopper.launch import HEADDIMS, RUNGS, plan


def compile_rung(rung: str, headdim: int, dtype: torch.dtype = torch.bfloat16, causal: bool = True) -> Compiled:
    """One rung with its tiles of 128 × 128."""
    q, k, v, out = (torch.empty(1, 128, 1, headdim, dtype=dtype) for _ in range(4))
    lse = torch.empty(1, 1, 128)
    launch = plan(q, k, v, out, lse, causal)
    return compile_for_hopper(RUNGS[rung].forward, launch.arguments, launch.num_warps)


def table() -> str:
    """The ladder in Markdown: bf16, causal, tiles of 128 × 128, two slots."""
    rows = [("rung", "lines", "d", *(f"`{name}`" for name in INSTRUCTIONS), "registers", "spilled", "shared", "TFLOPS")]
    rows.append(("---",) * len(rows[0]))
    for rung, module in RUNGS.items():
        for headdim in HEADDIMS:
            compiled = compile_rung(rung, headdim)
            name = f"`{Path(str(module.__file__)).name}`"
            figures = [count_lines(module), headdim, *compiled.instructions.values()]
            figures += [compiled.registers, compiled.spilled]
            rows.append((name, *map(str, figures), f"{compiled.shared:,} B", "not measured yet"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def count_lines(module) -> int:
    """Lines of code: no blanks, comments or docstrings."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.type == tokenize.STRING and previous in skipped
        if token.type not in skipped and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
        previous = token.type
    return len(lines)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":  # a kernel that was decorated under it cannot be compiled
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        sys.exit(subprocess.run([sys.executable, "-m", "kernels.hopper"], env=environment).returncode)
    print(f"triton {triton.__version__}, sm_90a\n\n{table()}")


if __name__ == "__main__":
    main()

"""Jobs to compiled kernels, for any GPU and without one.

A kernel that was decorated for the interpreter cannot be compiled, so compilations run in a child process without
TRITON_INTERPRET: `python -m kernels.compiling`. Results are kept in build/compiled, by a hash of the job, the kernel's
source with our modules that it imports, and Triton's version.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.compiling.job import Compiled, Job
from kernels.compiling.listing import read_listing
from kernels.runtime import COMPILE_ONLY
from kernels.targets import TARGETS, target_of

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "compiled"


def compile_kernels(jobs: Iterable[Job], cache: Path = CACHE) -> list[Compiled]:
    """Compiles kernels: a few seconds each the first time, then from the cache.

    Args:
        jobs: what to compile.
        cache: folder of the results.

    Returns:
        A result for each job; if a target cannot take an option, its `failure` names the option.

    Raises:
        ValueError: where a target is not supported, or a kernel's module does not exist.
        RuntimeError: where the compiling child process fails.

    Example:
        >>> from kernels.flash_attention.jobs import flash_attention_jobs
        >>> job = next(iter(flash_attention_jobs("sm_90", headdims=(64,)).values()))
        >>> list(compile_kernels([job])[0].instructions)
        ['wgmma']
    """
    jobs = list(jobs)
    for job in jobs:
        if job.target not in TARGETS:
            target_of(_capability(job.target))  # raises with the reason
            raise ValueError(f"target is {job.target!r}, wants one of {', '.join(TARGETS)}")
    files = [cache / f"{_key(job)}.json" for job in jobs]
    missing = {file: job for file, job in zip(files, jobs, strict=True) if not file.exists()}
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        for file, result in zip(missing, _compile_in_child(list(missing.values())), strict=True):
            unfinished = file.with_suffix(f".{os.getpid()}")  # another process may write the same file
            unfinished.write_text(json.dumps(result))
            unfinished.replace(file)
    return [Compiled(**json.loads(file.read_text())) for file in files]


def _capability(target: str) -> tuple[int, int]:
    digits = re.fullmatch(r"sm_(\d+)(\d)a?", target)
    if not digits:
        raise ValueError(f"target is {target!r}, wants one of {', '.join(TARGETS)}")
    return int(digits[1]), int(digits[2])


def _key(job: Job) -> str:
    sources = _sources(job.kernel.split(":")[0]) | set(Path(__file__).parent.glob("*.py"))
    parts = [json.dumps(asdict(job), sort_keys=True), importlib.metadata.version("triton")]
    parts += [path.read_text() for path in sorted(sources)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _sources(module: str) -> set[Path]:
    """The module's file and those of this repository that it imports, directly or through another."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"kernel is in {module!r}, and there is no such module")
    found: set[Path] = set()
    waiting = [Path(spec.origin)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported_files(path)
    return found


def _imported_files(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):  # a name may be a module too: from kernels import tiles
            names = [f"{node.module}", *(f"{node.module}.{name}" for name in names)]
        for name in names:
            if name.split(".")[0] in ("kernels", "tests"):
                place = ROOT.joinpath(*name.split("."))
                yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists())


def _compile_in_child(jobs: list[Job]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "kernels.compiling"],
        input=json.dumps([asdict(job) for job in jobs]),
        cwd=ROOT,
        env=environment | {COMPILE_ONLY: "1"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"the compiling child process failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def compile_job(job: Job) -> Compiled:
    """Compiles in this process, where Triton must not interpret. What the target cannot take becomes `failure`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = job.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, *_as_triton_wants(kernel.arg_names, job))
    major, minor = TARGETS[job.target].capability
    try:
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", 10 * major + minor, 32),
            options={"num_warps": job.warps, "num_stages": job.stages},
        )
    except Exception as error:  # each stage of the compiler raises its own type
        return Compiled(failure=f"{job} does not compile: {_last_line(error)}")
    compiled = read_listing(binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared)
    limit = TARGETS[job.target].shared_kib
    if compiled.shared_bytes > limit * 1024:
        need = -(-compiled.shared_bytes // 1024)
        failure = f"{job} needs {need} KiB of shared memory, a program has {limit} there: fewer stages, smaller blocks"
        return Compiled(**{**asdict(compiled), "failure": failure})
    return compiled


def _as_triton_wants(names: list[str], job: Job) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes): arguments are addressed by their position, (i,) or, in a tuple, (i, j)."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def one(kind: str, position: tuple[int, ...]) -> str:
        if kind in ("1", "None"):
            constants[position] = 1 if kind == "1" else None
            return "constexpr"
        if kind.endswith(":16"):
            attributes[position] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    for i, name in enumerate(names):
        if name in job.constants:
            signature[name], constants[i,] = "constexpr", job.constants[name]
        elif isinstance(job.signature[name], str):
            signature[name] = one(job.signature[name], (i,))
        else:
            signature[name] = tuple(one(kind, (i, j)) for j, kind in enumerate(job.signature[name]))
    return signature, constants, attributes


def _last_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(cause).__name__).strip()

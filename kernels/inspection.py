"""What the compiler makes of a kernel, for any GPU and without one: instructions, registers, spills, shared memory.

A kernel that was decorated for the interpreter cannot be compiled, so that compilations run in a child process without
TRITON_INTERPRET:

    python -m kernels.inspection < jobs.json > reports.json

Reports are kept in build/inspection, by a hash of the job, the kernel's file with those of ours that it imports, and
Triton's version.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernels.runtime import COMPILE_ONLY
from kernels.targets import REGISTERS, TARGETS, target_of

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "inspection"


@dataclass(frozen=True)
class Job:
    """One compilation.

    Args:
        kernel: where it stands, such as "kernels.flash_attention:forward_kernel".
        signature: a type for each argument that is no tl.constexpr: "*bf16", "fp32", "i32"; with ":16" behind it where
            pointer or number is divisible by 16 (Triton looks at that when it is called, and so do we); "1" and "None"
            where the argument is just that; a list for a tuple.
        constants: a value for each tl.constexpr.
        target: one of `kernels.targets`.
        warps, stages: as in a launch.
    """

    kernel: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    target: str
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        blocks = " × ".join(str(size) for name, size in self.constants.items() if name in ("BLOCK_Q", "BLOCK_K"))
        return (
            f"{self.kernel.split(':')[1]} {blocks} with {self.warps} warps and {self.stages} stages for {self.target}"
        )


@dataclass(frozen=True)
class Report:
    """What came out.

    Args:
        instructions: tensor-core instructions in the PTX by kind: "mma.sync", "wgmma", "tcgen05".
        example: one of them as it stands there.
        async_copies: instructions that copy to shared memory beside the computation (cp.async, TMA).
        hopper: how often each of HOPPER stands in the PTX, where a loop's body stands once.
        registers_set: the numbers of registers that warps set for themselves (setmaxnreg), each once.
        registers: of 32 bits, for each thread.
        spilled_bytes: for each thread, what did not fit into registers and went to memory.
        shared_bytes: for each program.
        failure: why it was not compiled; empty where it was.
    """

    instructions: dict[str, int] = field(default_factory=dict)
    example: str = ""
    async_copies: int = 0
    hopper: dict[str, int] = field(default_factory=dict)
    registers_set: list[int] = field(default_factory=list)
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    failure: str = ""

    def occupancy(self, job: Job) -> float:
        """The share of a multiprocessor's warps that can be there: registers, shared memory or programs limit it."""
        target = TARGETS[job.target]
        registers = job.warps * -(-self.registers * 32 // 256) * 256  # handed out to warps in units of 256
        shared = self.shared_bytes + 1024  # the driver takes 1 KiB for each program
        fitting = [target.programs, target.warps // job.warps, (target.shared_kib + 1) * 1024 // shared]
        if registers:
            fitting.append(REGISTERS // registers)
        return min(fitting) * job.warps / target.warps


def inspect(jobs: Iterable[Job], cache: Path = CACHE) -> list[Report]:
    """Compiles kernels, or remembers what came out the last time: a few seconds each at first.

    Args:
        jobs: what to compile.
        cache: folder of the reports.

    Returns:
        A report for each job; where a target cannot take an option, its `failure` names the option.

    Raises:
        ValueError: where a target is not supported.
    """
    jobs = list(jobs)
    for job in jobs:
        if job.target not in TARGETS:
            target_of(_capability(job.target))  # says why
            raise ValueError(f"target is {job.target!r}, wants one of {', '.join(TARGETS)}")
    files = [cache / f"{_key(job)}.json" for job in jobs]
    missing = {file: job for file, job in zip(files, jobs, strict=True) if not file.exists()}
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        for file, report in zip(missing, _compile_in_child(list(missing.values())), strict=True):
            unfinished = file.with_suffix(f".{os.getpid()}")  # two processes may be here at the same time
            unfinished.write_text(json.dumps(report))
            unfinished.replace(file)
    return [Report(**json.loads(file.read_text())) for file in files]


def _capability(target: str) -> tuple[int, int]:
    digits = re.fullmatch(r"sm_(\d+)(\d)a?", target)
    if not digits:
        raise ValueError(f"target is {target!r}, wants one of {', '.join(TARGETS)}")
    return int(digits[1]), int(digits[2])


def _key(job: Job) -> str:
    parts = [json.dumps(asdict(job), sort_keys=True), importlib.metadata.version("triton")]
    parts += [path.read_text() for path in sorted(_sources(job.kernel.split(":")[0]))] + [Path(__file__).read_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


OURS = re.compile(r"^(?:from|import) ((?:kernels|tests)\b[\w.]*)", re.MULTILINE)


def _sources(module: str, found: set[Path] | None = None) -> set[Path]:
    """The module's file, and those of this repository's that it imports, and they in turn."""
    found = set() if found is None else found
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"kernel is in {module!r}, and there is no such module")
    path = Path(spec.origin)
    if path not in found:
        found.add(path)
        for imported in OURS.findall(path.read_text()):
            _sources(imported, found)
    return found


def _compile_in_child(jobs: list[Job]) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "kernels.inspection"],
        input=json.dumps([asdict(job) for job in jobs]),
        cwd=ROOT,
        env=environment | {COMPILE_ONLY: "1"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"the compiling child process failed:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def compile_job(job: Job) -> Report:
    """Compiles in this process, which must not interpret. What the target cannot take becomes the report's failure."""
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
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", 10 * major + minor, 32),
            options={"num_warps": job.warps, "num_stages": job.stages},
        )
    except Exception as error:  # any stage may refuse, each with its own type
        return Report(failure=f"{job} does not compile: {_last_line(error)}")
    report = _report(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)
    limit = TARGETS[job.target].shared_kib
    if report.shared_bytes > limit * 1024:
        need = -(-report.shared_bytes // 1024)
        failure = f"{job} needs {need} KiB of shared memory, a program has {limit} there: fewer stages, smaller blocks"
        return Report(**{**asdict(report), "failure": failure})
    return report


def _as_triton_wants(names: list[str], job: Job) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes): arguments are addressed by their place, (i,) or, in a tuple, (i, j)."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def one(kind: str, place: tuple[int, ...]) -> str:
        if kind in ("1", "None"):
            constants[place] = 1 if kind == "1" else None
            return "constexpr"
        if kind.endswith(":16"):
            attributes[place] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    for i, name in enumerate(names):
        if name in job.constants:
            signature[name], constants[i,] = "constexpr", job.constants[name]
        elif isinstance(job.signature[name], str):
            signature[name] = one(job.signature[name], (i,))
        else:
            signature[name] = tuple(one(kind, (i, j)) for j, kind in enumerate(job.signature[name]))
    return signature, constants, attributes


TENSOR_CORE = {"mma.sync": r"mma\.sync\.\S+", "wgmma": r"wgmma\.mma_async\.\S+", "tcgen05": r"tcgen05\.mma\.\S+"}
HOPPER = ("wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier.try_wait", "setmaxnreg")
ASYNC_COPY = r"cp\.async\.(?:c[ag]\.shared|bulk\.tensor)\S*"


def _report(ptx: str, cubin: bytes, shared_bytes: int) -> Report:
    found = {kind: re.findall(rf"(?<!w)(?:\b){pattern}", ptx) for kind, pattern in TENSOR_CORE.items()}
    found = {kind: lines for kind, lines in found.items() if lines}
    usage = _resource_usage(cubin)
    return Report(
        instructions={kind: len(lines) for kind, lines in found.items()},
        example=next(iter(found.values()))[0] if found else "",
        async_copies=len(re.findall(ASYNC_COPY, ptx)),
        hopper={name: ptx.count(name) for name in HOPPER},
        registers_set=sorted({int(number) for number in re.findall(r"setmaxnreg\S+\s+(\d+)", ptx)}),
        registers=usage["REG"],
        spilled_bytes=usage["STACK"],  # our kernels have no arrays in local memory: what is there was spilled
        shared_bytes=shared_bytes,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says about the machine code: {"REG": 128, "STACK": 0, …}."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _last_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return next((line for line in reversed(str(cause).splitlines()) if line.strip()), type(cause).__name__).strip()


if __name__ == "__main__":
    print(json.dumps([asdict(compile_job(Job(**job))) for job in json.load(sys.stdin)]))

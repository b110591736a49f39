"""FlashAttention compiled for an H100 without one: tensor-core instructions, registers, shared memory, occupancy."""

from kernels.compiling import compile_kernels
from kernels.flash_attention.jobs import flash_attention_jobs

# A Job names a kernel, the types of its arguments and its constants; these are the course's own, forward and backward.
# The first time each takes some seconds, later the stored result is read.
jobs = flash_attention_jobs("sm_90", headdims=(128,))
for (name, job), compiled in zip(jobs.items(), compile_kernels(jobs.values()), strict=True):
    print(name)
    print(f"  instructions   {compiled.instructions}, such as {compiled.example}")
    print(f"  registers      {compiled.registers} a thread, {compiled.spilled_bytes} bytes of them spilled to memory")
    print(f"  shared memory  {compiled.shared_bytes // 1024} KiB a program")
    print(f"  occupancy      {compiled.occupancy(job):.0%} of a multiprocessor's warps")

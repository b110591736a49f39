"""A Gluon kernel for Hopper, run on the CPU: right, and then without its fence, which the emulator names."""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.emulator import Report, emulate
from kernels.gluon_names import tma_load, tma_store  # Triton 3.6 to 3.9 have different names for the copies


@gluon.jit
def double(source, target, FENCED: gl.constexpr):
    """Each program copies 32 rows to shared memory, doubles them, and copies them back."""
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    mbarrier.expect(landed, source.block_type.nbytes)
    tma_load(source, [gl.program_id(0) * 32, 0], landed, tile)
    mbarrier.wait(landed, 0)
    tile.store(tile.load(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])) * 2)
    if FENCED:
        fence_async_shared()  # what threads wrote is seen by the copy engine only after this
    tma_store(target, [gl.program_id(0) * 32, 0], tile)
    tma.store_wait(0)


x = torch.randn(100, 64, dtype=torch.float16)
out = torch.zeros_like(x)
layout = gl.NVMMASharedLayout.get_default_for([32, 64], gl.float16)
blocks = [TensorDescriptor.from_tensor(tensor, [32, 64], layout) for tensor in (x, out)]

run = emulate(double, (4,), *blocks, FENCED=True, num_warps=4, explore=20)
print(f"with the fence, {run.programs} programs in {run.interleavings} orders: out == 2 x is {torch.equal(out, 2 * x)}")

try:
    emulate(double, (4,), *blocks, FENCED=False, num_warps=4)
except Report as report:
    print(f"without it:\n{report}")

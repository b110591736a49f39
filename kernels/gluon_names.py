"""Names of Gluon's Hopper module that differ between triton 3.6 and 3.9, resolved for the installed version.

| here | 3.6, 3.7 | 3.8 | 3.9 |
|---|---|---|---|
| `tma_load` | `tma.async_copy_global_to_shared` | `tma.async_load`, and the older name | `tma.async_load` alone |
| `tma_store` | `tma.async_copy_shared_to_global` | `tma.async_store`, and the older name | `tma.async_store` alone |
| `allocate_barriers` | none; 3.7 has `mbarrier.allocate_mbarrier`, without the init | as 3.7 | as 3.7 |
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers in shared memory, each completed by ARRIVALS arrivals; take one with `.index(i)`."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers

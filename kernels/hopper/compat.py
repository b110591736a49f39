"""Gluon's names for Hopper, as they are in the triton that is installed: 3.6 to 3.9 do not all say the same.

| here | 3.6, 3.7 | 3.8 | 3.9 |
|---|---|---|---|
| `tma_load` | `tma.async_copy_global_to_shared` | `tma.async_load`, or the older name | `tma.async_load` alone |
| `tma_store` | `tma.async_copy_shared_to_global` | `tma.async_store`, or the older name | `tma.async_store` alone |
| `allocate_barriers` | from 3.7 on `mbarrier.allocate_mbarrier` does half of it | the same | the same |
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

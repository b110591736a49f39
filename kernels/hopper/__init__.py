"""FlashAttention-3's ideas in Gluon, one file a rung, each adding one idea to the one before.

| rung | idea |
|---|---|
| `rung1_tma_wgmma.py` | TMA copies and WGMMA products, one after the other |
| `rung2_pipelined.py` | copies run ahead, into a ring of tiles with mbarriers |
| `rung3_specialized.py` | warp specialisation: a producer and consumers, with registers reallocated |

`tile.py` is the arithmetic that all share, `launch.py` the call from Python, `jobs.py` the rungs as jobs for
`kernels.compiling`. `python -m kernels.hopper` runs each in the emulator and prints what it compiles to.

Source:
    Shah et al., "FlashAttention-3", arXiv 2407.08608; Dao, "FlashAttention-2", arXiv 2307.08691.
"""

"""FlashAttention-2 in Triton, forward and backward, for padded and ragged batches. Read it in this order:

| file | content |
|---|---|
| `launch.py` | `flash_attention`: checked arguments, the torch operators |
| `call.py` | `Call`: what the kernels of one call share, a launch for each kernel |
| `descriptors.py` | which calls load tiles by tensor descriptors (TMA), and why others take pointers |
| `forward.py` | `forward_kernel` and its inner loop: algorithm 1 |
| `backward.py` | `delta_kernel`, `backward_kv_kernel`, `backward_q_kernel`: algorithm 2 |
| `../tiles.py` | what they share: offsets, loads and stores, masks, the softmax step |
| `jobs.py` | the same kernels as jobs for `kernels.compiling` |

A program owns a tile of queries and walks over the tiles of keys that they see. The backward does that again for dQ,
and with keys and queries exchanged for dK and dV. No two programs write the same element, so there are no atomics and
the same call gives the same bits every time.

Source: FlashAttention-2 (Dao, arXiv 2307.08691), algorithms 1 and 2.
"""

from kernels.flash_attention.launch import Ragged, flash_attention

__all__ = ["Ragged", "flash_attention"]

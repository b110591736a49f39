"""Where keys and values of past tokens stay.

A cache is what has these, and nothing outside reads its buffers or their axes:

| | |
|---|---|
| `append(k, v, layer_idx, counts=None)` | takes new tokens into a layer, gives back the `Keys` that queries attend to |
| `lengths` | tokens that each row holds |
| `truncate(lengths)` | forgets what each row holds beyond a length |
| `fork()` | a copy that goes on independently |
| `nbytes`, `used_bytes` | bytes allocated, and bytes of the tokens that are there |

`contiguous.KVCache` is its plainest form: one buffer for all layers.
"""

from minillm.cache.contiguous import KVCache

__all__ = ["KVCache"]

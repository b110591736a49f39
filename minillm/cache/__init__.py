"""Where keys and values of past tokens stay: `contiguous.KVCache`, one buffer a layer."""

from minillm.cache.contiguous import KVCache

__all__ = ["KVCache"]

"""The KV cache (KV 缓存) in its plainest form: one buffer of keys and values, filled row by row."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from minillm.attention.keys import Keys
from minillm.config import ModelConfig


class KVCache:
    """Keys and values of the tokens so far, for every layer; each row of the batch has its own length.

    A row's tokens lie in slots 0 to length - 1 without gaps, keys after RoPE. What `truncate` forgets becomes zeros:
    the step of a longer row reads those slots too, with weight 0, and 0 times a stale NaN would be NaN.

    Args:
        config: the model's shape; its `max_position_embeddings` is the limit of a row.
        batch_size: rows.
        capacity: tokens a row to allocate now. Left out: the limit, and nothing ever grows. Where it is less,
            the buffer doubles whenever it is full, up to the limit.
        dtype, device: of keys and values; those of the model. Under autocast (自动混合精度) the model computes keys in
            autocast's dtype: then a cache of that dtype is right, and one that holds it exactly, such as fp32.

    Attributes:
        limit: tokens that a row can hold at most.

    Raises:
        ValueError: where a size makes no sense.

    Example:
        >>> config = ModelConfig.small()
        >>> cache = KVCache(config, batch_size=1, capacity=16)
        >>> for layer in range(config.num_hidden_layers):
        ...     keys = cache.append(*torch.randn(2, 1, 5, 2, 32), layer)
        >>> cache.lengths, cache.nbytes  # 4 layers · 2 · 16 slots · 2 heads · 32 numbers of 4 bytes
        ([5], 32768)
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        self.limit = config.max_position_embeddings
        capacity = self.limit if capacity is None else capacity
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, wants 1 or more")
        if not 1 <= capacity <= self.limit:
            raise ValueError(f"capacity is {capacity}, wants 1 to the model's max_position_embeddings {self.limit}")
        shape = (config.num_hidden_layers, 2, batch_size, capacity, config.num_key_value_heads, config.head_dim)
        self._buffer = _empty_slots(shape, dtype, device)
        self._lengths = [[0] * batch_size for _ in range(config.num_hidden_layers)]

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, layer_idx: int, counts: Sequence[int] | None = None) -> Keys:
        """Takes new tokens into a layer, and gives back all that it then holds.

        Args:
            k, v: (batch, seqlen, nheads_k, headdim), any number of tokens, 0 included; keys after RoPE.
            layer_idx: the layer.
            counts: how many of each row's tokens are taken in, the first ones; left out, all.

        Returns:
            Keys of every row up to its length, in k's dtype; views of the buffer where that has it too. No gradient
            passes.

        Raises:
            ValueError: where shapes, layer or counts do not fit, or a row would pass the limit; nothing has changed
                then.
        """
        counts = [k.shape[1]] * self.batch_size if counts is None else counts
        self._check(k, v, layer_idx, counts)
        starts = self._lengths[layer_idx]
        stops = [start + count for start, count in zip(starts, counts, strict=True)]
        self.reserve(max(stops))
        keys, values = self._buffer[layer_idx]
        if all_equal(starts) and all_equal(stops):
            keys[:, starts[0] : stops[0]] = k[:, : counts[0]]
            values[:, starts[0] : stops[0]] = v[:, : counts[0]]
        else:
            for row, (start, stop, count) in enumerate(zip(starts, stops, counts, strict=True)):
                keys[row, start:stop] = k[row, :count]
                values[row, start:stop] = v[row, :count]
        self._lengths[layer_idx] = stops
        lengths = None if all_equal(stops) else torch.tensor(stops, dtype=torch.int32, device=keys.device)
        keys, values = (x[:, : max(stops)].to(k.dtype) for x in (keys, values))
        return Keys(keys, values, cache_seqlens=lengths)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`append` under the name and with the result of transformers' caches, in our layout.

        Returns:
            keys, values: (batch, longest length, nheads_k, headdim), views of the buffer.
        """
        keys = self.append(key, value, layer_idx, counts)
        return keys.k, keys.v

    def next_slots(self) -> NextSlots:
        """Makes room for one more token a row, and shows where it goes in every layer; `advance` then counts it.

        Raises:
            ValueError: where a row would pass the limit; nothing has changed then.
        """
        self.reserve(max(self.lengths) + 1)
        return NextSlots(self._buffer, self.lengths)

    def reserve(self, tokens: int) -> None:
        """Makes room for this many tokens a row: by doubling, so that growing to n tokens copies fewer than 2n.

        Raises:
            ValueError: where that is more than the limit; nothing has changed then.
        """
        if tokens > self.limit:
            raise ValueError(
                f"a row would hold {tokens} tokens, the model's max_position_embeddings is {self.limit}: "
                "truncate the cache, or append fewer"
            )
        if tokens > self.capacity:
            capacity = self.capacity
            while capacity < tokens:
                capacity *= 2
            old = self._buffer
            shape = (*old.shape[:3], min(capacity, self.limit), *old.shape[4:])
            self._buffer = _empty_slots(shape, old.dtype, old.device)
            self._buffer[:, :, :, : old.shape[3]] = old

    def advance(self) -> None:
        """Counts one more token in each row, which has been written to the `next_slots` of all layers."""
        self._lengths = [[length + 1 for length in lengths] for lengths in self._lengths]

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each row all layers hold: the layers fill in order, so the last one has the fewest."""
        return list(self._lengths[-1])

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._buffer.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens a row for which there is room now."""
        return self._buffer.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated: layers · 2 · batch · capacity · KV heads · head dim · bytes a number."""
        return self._buffer.nbytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots that hold a token."""
        return self.nbytes // (self.batch_size * self.capacity) * sum(self.lengths)

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forgets what each row holds beyond a length, and clears it: one length for all rows, or one a row.

        Raises:
            ValueError: where a length is negative, or more than the row has.
            TypeError: where a length is no integer.
        """
        numbers = torch.as_tensor(lengths).tolist()
        wanted = [index(number) for number in (numbers if isinstance(numbers, list) else [numbers] * self.batch_size)]
        have = self.lengths
        if len(wanted) != len(have) or any(not 0 <= want <= has for want, has in zip(wanted, have, strict=False)):
            raise ValueError(f"lengths is {lengths}, the rows hold {have}: want 0 to that, for each row")
        for row, (want, *held) in enumerate(zip(wanted, *self._lengths, strict=True)):
            self._buffer[:, :, row, want : max(held)] = 0  # a forward that was interrupted left some layers longer
        self._lengths = [list(wanted) for _ in self._lengths]

    @torch.inference_mode(False)  # as in `_empty_slots`
    def fork(self) -> KVCache:
        """A copy with a buffer of its own: both go on independently, as two continuations of one text do."""
        copy = object.__new__(KVCache)
        copy.limit, copy._buffer = self.limit, self._buffer.clone()
        copy._lengths = [list(lengths) for lengths in self._lengths]
        return copy

    def check_fits(self, config: ModelConfig, batch_size: int, weight: Tensor) -> None:
        """Raises ValueError where a model with this config and such weights cannot decode so many rows with it."""
        layers, _, rows, _, nheads_k, headdim = self._buffer.shape
        if not all_equal(self._lengths):
            raise ValueError(f"kv_cache's layers hold {self._lengths} tokens: truncate it to what all of them hold")
        for name, has, wants in (
            ("batch_size", rows, batch_size),
            ("layers", layers, config.num_hidden_layers),
            ("KV heads", nheads_k, config.num_key_value_heads),
            ("headdim", headdim, config.head_dim),
            ("dtype", self._buffer.dtype, self._wanted_dtype(weight)),
            ("device", self._buffer.device, weight.device),
            ("limit", self.limit, min(self.limit, config.max_position_embeddings)),
        ):
            if has != wants:
                raise ValueError(
                    f"kv_cache has {name} {has}, wants {wants}: make it for this model, with a row for each of the ids'"
                )

    def _wanted_dtype(self, weight: Tensor) -> torch.dtype:
        """The weights' dtype; under autocast, the buffer's own where it holds without loss what is computed then."""
        device_type, own = weight.device.type, self._buffer.dtype
        if not torch.is_autocast_enabled(device_type) or weight.dtype == torch.float64:  # which autocast leaves alone
            return weight.dtype
        computed = torch.get_autocast_dtype(device_type)
        return own if torch.promote_types(own, computed) == own else computed

    def _check(self, k: Tensor, v: Tensor, layer_idx: int, counts: Sequence[int]) -> None:
        layers, _, batch, _, nheads_k, headdim = self._buffer.shape
        if not 0 <= layer_idx < layers:
            raise ValueError(f"layer_idx is {layer_idx}, wants 0 to {layers - 1}")
        if k.shape != v.shape or k.ndim != 4 or k.shape != (batch, k.shape[1], nheads_k, headdim):
            raise ValueError(
                f"key has shape {tuple(k.shape)} and value {tuple(v.shape)}, "
                f"want ({batch}, seqlen, {nheads_k}, {headdim}) for both"
            )
        holds = self._buffer.dtype
        for name, x in (("key", k), ("value", v)):
            if x.device != self._buffer.device or torch.promote_types(x.dtype, holds) != holds:
                raise ValueError(
                    f"{name} is {x.dtype} on {x.device}, the cache holds {holds} on {self._buffer.device}: "
                    "make the cache with the model's dtype and device"
                )
        if len(counts) != batch or not 0 <= min(counts) <= max(counts) <= k.shape[1]:
            raise ValueError(f"counts is {list(counts)}, wants 0 to {k.shape[1]}, for each of {batch} rows")


class NextSlots:
    """Where the keys and values of a step's tokens go, one a row, and what its queries see: for the packed `Decoder`.

    Args:
        buffer: (layers, 2, batch, capacity, nheads_k, headdim).
        lengths: tokens that each row holds.

    Attributes:
        positions: of the new tokens: a slice where all rows are equally long, else (batch,) int64.
        keys, values: for each layer (batch, nheads_k, longest + 1, headdim), the new token's slot included.
        mask: (batch, 1, 1, longest + 1) bool, True where a row sees the slot; None where all rows see all of them.
    """

    def __init__(self, buffer: Tensor, lengths: list[int]):
        longest, device = max(lengths), buffer.device
        keys, values = buffer.narrow(3, 0, longest + 1).transpose(3, 4).unbind(1)
        self.keys, self.values = keys.unbind(0), values.unbind(0)
        self.positions: Tensor | slice = slice(longest, longest + 1)
        self.mask: Tensor | None = None
        self._rows: Tensor | None = None
        if all_equal(lengths):
            self._slots = buffer.select(3, longest).unbind(0)  # (2, batch, nheads_k, headdim) each
        else:
            self._slots = buffer.unbind(0)  # (2, batch, capacity, nheads_k, headdim) each
            self._rows = torch.arange(len(lengths), device=device)
            self.positions = torch.tensor(lengths, device=device)
            seen = torch.arange(longest + 1, device=device) <= self.positions[:, None]
            self.mask = seen[:, None, None]

    def write(self, layer_idx: int, new: Tensor) -> None:
        """Stores the step's keys and values of a layer, (2, batch, nheads_k, headdim)."""
        if self._rows is None:
            self._slots[layer_idx].copy_(new)
        else:
            self._slots[layer_idx][:, self._rows, self.positions] = new


@torch.inference_mode(False)  # a tensor made in inference mode could not be written to outside of it
def _empty_slots(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros in (layers, 2, batch, capacity, nheads_k, headdim); in memory, the slots of a head lie side by side.

    So a decode step reads each head's keys as one stream, from main memory twice as fast as in pieces of a row. Slots
    without a token hold zeros, because a longer row's step reads them with weight 0.
    """
    layers, two, batch, capacity, nheads_k, headdim = shape
    return torch.zeros(layers, two, batch, nheads_k, capacity, headdim, dtype=dtype, device=device).transpose(3, 4)


def all_equal(items: Sequence[Any]) -> bool:
    """Whether all items are the same, such as the lengths of rows: then one slice serves them all."""
    return all(item == items[0] for item in items)

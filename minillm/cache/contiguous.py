"""The KV cache (KV 缓存) in its plainest form: one buffer of keys and values, filled row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.config import ModelConfig


class KVCache:
    """Keys and values of the tokens so far, for every layer; each row of the batch has its own length.

    A row's tokens lie in slots 0 … length - 1 without gaps, keys after RoPE. The slots behind them hold zeros: a longer
    row's step reads them too, with weight 0, and 0 times a NaN that was left there would be NaN.

    Args:
        config: the model's shape; its `max_position_embeddings` is the limit of a row.
        batch_size: rows.
        capacity: tokens a row to allocate now. Left out: the limit, and nothing ever grows. Where it is less,
            the buffer doubles whenever it is full, up to the limit.
        dtype, device: of keys and values; those of the model.

    Attributes:
        buffer: (layers, 2, batch, capacity, nheads_k, headdim), keys at 0 and values at 1.
        limit: tokens that a row can hold at most.

    Raises:
        ValueError: where a size makes no sense.
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
        self.buffer = _empty_slots(shape, dtype, device)
        self._lengths = [[0] * batch_size for _ in range(config.num_hidden_layers)]

    @torch.no_grad()
    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Appends to a layer, and gives back all that it holds: transformers' method, in our layout.

        Args:
            key, value: (batch, seqlen, nheads_k, headdim), any number of tokens, 0 included; keys after RoPE.
            layer_idx: the layer.
            counts: how many of each row's tokens are appended, the first ones; left out, all.

        Returns:
            keys, values: (batch, longest length, nheads_k, headdim), views of the buffer; no gradient passes.

        Raises:
            ValueError: where shapes, layer or counts do not fit, or a row would pass the limit; nothing has changed
                then.
        """
        counts = [key.shape[1]] * self.batch_size if counts is None else counts
        self._check(key, value, layer_idx, counts)
        starts = self._lengths[layer_idx]
        stops = [start + count for start, count in zip(starts, counts, strict=True)]
        self.reserve(max(stops))
        keys, values = self.buffer[layer_idx, 0], self.buffer[layer_idx, 1]
        if all_equal(starts) and all_equal(stops):
            keys[:, starts[0] : stops[0]] = key[:, : counts[0]]
            values[:, starts[0] : stops[0]] = value[:, : counts[0]]
        else:
            for row, (start, stop, count) in enumerate(zip(starts, stops, counts, strict=True)):
                keys[row, start:stop] = key[row, :count]
                values[row, start:stop] = value[row, :count]
        self._lengths[layer_idx] = stops
        return keys[:, : max(stops)], values[:, : max(stops)]

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
            old = self.buffer
            shape = (*old.shape[:3], min(capacity, self.limit), *old.shape[4:])
            self.buffer = _empty_slots(shape, old.dtype, old.device)
            self.buffer[:, :, :, : old.shape[3]] = old

    def advance(self) -> None:
        """Counts one more token in each row, which the caller has written to the buffer of all layers itself."""
        self._lengths = [[length + 1 for length in lengths] for lengths in self._lengths]

    @property
    def lengths(self) -> list[int]:
        """How many tokens of each row all layers hold: the layers fill in order, so the last one has the fewest."""
        return list(self._lengths[-1])

    @property
    def batch_size(self) -> int:
        return self.buffer.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens a row for which there is room now."""
        return self.buffer.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated: layers · 2 · batch · capacity · KV heads · head dim · bytes a number."""
        return self.buffer.nbytes

    def truncate(self, lengths: int | Sequence[int]) -> None:
        """Forgets what each row holds beyond a length, and clears it: one length for all rows, or one a row.

        Raises:
            ValueError: where a length is negative, or more than the row has.
        """
        wanted = [lengths] * self.batch_size if isinstance(lengths, int) else list(lengths)
        have = self.lengths
        if len(wanted) != len(have) or any(not 0 <= want <= has for want, has in zip(wanted, have, strict=False)):
            raise ValueError(f"lengths is {lengths}, the rows hold {have}: want 0 to that, for each row")
        for row, (want, *held) in enumerate(zip(wanted, *self._lengths, strict=True)):
            self.buffer[:, :, row, want : max(held)] = 0  # a forward that was interrupted left some layers longer
        self._lengths = [list(wanted) for _ in self._lengths]

    @torch.inference_mode(False)  # as in `_empty_slots`
    def fork(self) -> KVCache:
        """A copy with a buffer of its own: both go on independently, as two continuations of one text do."""
        copy = object.__new__(KVCache)
        copy.limit, copy.buffer = self.limit, self.buffer.clone()
        copy._lengths = [list(lengths) for lengths in self._lengths]
        return copy

    def check_fits(self, config: ModelConfig, batch_size: int, weight: Tensor) -> None:
        """Raises ValueError where a model with this config and such weights cannot decode so many rows with it."""
        layers, _, rows, _, nheads_k, headdim = self.buffer.shape
        for name, has, wants in (
            ("batch_size", rows, batch_size),
            ("layers", layers, config.num_hidden_layers),
            ("KV heads", nheads_k, config.num_key_value_heads),
            ("headdim", headdim, config.head_dim),
            ("dtype", self.buffer.dtype, weight.dtype),
            ("device", self.buffer.device, weight.device),
            ("limit", self.limit, min(self.limit, config.max_position_embeddings)),
        ):
            if has != wants:
                raise ValueError(
                    f"kv_cache has {name} {has}, wants {wants}: make it for this model, with a row for each of the ids'"
                )

    def _check(self, key: Tensor, value: Tensor, layer_idx: int, counts: Sequence[int]) -> None:
        layers, _, batch, _, nheads_k, headdim = self.buffer.shape
        if not 0 <= layer_idx < layers:
            raise ValueError(f"layer_idx is {layer_idx}, wants 0 to {layers - 1}")
        if key.shape != value.shape or key.ndim != 4 or key.shape != (batch, key.shape[1], nheads_k, headdim):
            raise ValueError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}, "
                f"want ({batch}, seqlen, {nheads_k}, {headdim}) for both"
            )
        if len(counts) != batch or not 0 <= min(counts) <= max(counts) <= key.shape[1]:
            raise ValueError(f"counts is {list(counts)}, wants 0 to {key.shape[1]}, for each of {batch} rows")


@torch.inference_mode(False)  # a tensor made in inference mode could not be written to outside of it
def _empty_slots(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Zeros, as `KVCache` says of the slots that no token has."""
    return torch.zeros(shape, dtype=dtype, device=device)


def all_equal(numbers: Sequence[int]) -> bool:
    """Whether all rows are equally long: then one slice serves them all."""
    return all(number == numbers[0] for number in numbers)

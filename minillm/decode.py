"""The decode step packed for speed: one token a row, and few operators beside the products with the weights.

On a CPU a step of a small model is a walk over all its weights, and every other operator costs as much as several
thousand of them. So this is the model once more, unrolled: q, k and v from one matrix, gate and up from one, the
norms' weights multiplied into the matrix behind them, results written into buffers that are made once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.attention.inputs import own_precision
from minillm.cache import KVCache
from minillm.cache.contiguous import NextSlots
from minillm.model import Block, MiniLLM, SelfAttention
from minillm.rope import rotary_tables

Weights = Literal["same", "int8"]
INT8_STEP = 16  # numbers of a row that torch's int8 product takes at a time
Matrix = Tensor | tuple[Tensor, Tensor]  # (in, out); or int8 (out, in) with a scale for each output


def without_autocast(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A step computes in the dtype that its weights were packed in, under autocast too."""

    @wraps(step)
    def in_own_precision(decoder: Decoder, token_ids: Tensor, kv_cache: KVCache) -> Tensor:
        with own_precision(token_ids):
            return step(decoder, token_ids, kv_cache)

    return in_own_precision


class PackedLayer(NamedTuple):
    """A block's four matrices, as a step walks over them, and what some models add to q, k and v."""

    qkv: Matrix
    o: Matrix
    gate_up: Matrix
    down: Matrix
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # (heads of q and of k, head_dim)
    windowed: bool


class Decoder:
    """Next-token logits, one token a row at a time, equal to those of `model(input_ids, kv_cache=…)`.

    It does whatever the model's configuration asks for: windows, biases, norms of q and k, and every scaling of RoPE.

    Args:
        model: its weights are copied, packed for the step; later changes of the model have no effect.
        weights: "same" keeps the model's dtype; "int8" stores each matrix in 8 bits with a scale for each output
            (weight-only quantisation, 仅权重量化) and multiplies in bf16: a quarter of the bytes, less exact.

    Raises:
        ValueError: where `weights` is unknown.

    The buffers of a step belong to one thread at a time: `fork` gives another thread its own.
    """

    def __init__(self, model: MiniLLM, weights: Weights = "same"):
        if weights not in ("same", "int8"):
            raise ValueError(f"weights is {weights!r}, wants 'same' or 'int8'")
        self.config = model.config
        self._pack(model, quantise_padded if weights == "int8" else lambda weight: weight.t().contiguous())
        self._make_buffers(1)

    def fork(self) -> Decoder:
        """The same packed weights with buffers of its own, so that each thread can step, or each of several texts."""
        fork = copy.copy(self)
        fork._make_buffers(self.batch_size)
        return fork

    @torch.inference_mode()
    @without_autocast
    def step(self, token_ids: Tensor, kv_cache: KVCache) -> Tensor:
        """Takes in one token a row and writes its keys and values into the cache.

        Args:
            token_ids: (batch,) int64.
            kv_cache: what came before, with as many rows; of the model's dtype and device.

        Returns:
            logits: (batch, vocab_size). The next step overwrites them.

        Raises:
            ValueError: where the cache does not fit, or a row would pass the model's limit; it is then as it was.
        """
        if token_ids.ndim != 1:
            raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}, wants (batch,)")
        kv_cache.check_fits(self.config, len(token_ids), self._embedding)
        if len(token_ids) != self.batch_size:
            self._make_buffers(len(token_ids))
        slots = kv_cache.next_slots()
        if kv_cache.capacity > len(self._turn):
            self._make_rotations(kv_cache.capacity)
        first_seen, window_mask = self._window(slots)
        turn, sin = self._turn[slots.positions], self._sin[slots.positions]
        x, qkv, turned, gate, up, hidden = self._x, self._qkv, self._turned, self._gate, self._up, self._hidden
        torch.index_select(self._embedding, 0, token_ids, out=x)
        for layer, weights in enumerate(self._layers):
            self._normed(weights.qkv, out=qkv)
            if weights.qkv_bias is not None:
                qkv.add_(weights.qkv_bias)
            if weights.qk_norm is not None:
                normed = F.rms_norm(self._qk, self._qk.shape[-1:], eps=self.config.rms_norm_eps)
                torch.mul(normed, weights.qk_norm, out=self._qk)
            torch.mul(self._heads, turn, out=turned)  # q, k by the cosine, v by 1
            self._turned_first.addcmul_(self._second, sin, value=-1)
            self._turned_second.addcmul_(self._first, sin)
            slots.write(layer, self._new_kv)
            keys, values, mask = slots.keys[layer], slots.values[layer], slots.mask
            if weights.windowed:
                keys, values, mask = keys[:, :, first_seen:], values[:, :, first_seen:], window_mask
            out = F.scaled_dot_product_attention(self._q, keys, values, mask)
            add_product(x, out.reshape(self.batch_size, -1), weights.o)
            self._normed(weights.gate_up, out=self._gate_up)
            add_product(x, torch.mul(F.silu(gate, inplace=True), up, out=hidden), weights.down)
        kv_cache.advance()
        return self._normed(self._head, out=self._logits)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices that a step reads."""
        layers = [(layer.qkv, layer.o, layer.gate_up, layer.down) for layer in self._layers]
        matrices: list[Matrix] = [*(matrix for layer in layers for matrix in layer), self._head]
        parts = [part for matrix in matrices for part in (matrix if isinstance(matrix, tuple) else (matrix,))]
        return sum(part.nbytes for part in parts)

    def _normed(self, weight: Matrix, out: Tensor) -> Tensor:
        """RMSNorm(x) @ weight. The norm divides a row by one number, and a product can be divided afterwards."""
        if self._one_row:
            mean_square = torch.dot(self._row, self._row).item() / self.config.hidden_size
            alpha = (mean_square + self.config.rms_norm_eps) ** -0.5
            if isinstance(weight, Tensor):  # BLAS takes such a number along for nothing
                return torch.addmm(out, self._x, weight, beta=0, alpha=alpha, out=out)
            return product(torch.mul(self._x, alpha, out=self._narrow_x), weight, out)
        factor = (self._x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt_()
        return product(self._x, weight, out).mul_(factor)

    @torch.no_grad()
    def _pack(self, model: MiniLLM, pack) -> None:
        def join(norm: nn.RMSNorm, *linears: nn.Linear) -> Matrix:
            return pack(torch.cat([linear.weight for linear in linears]) * norm.weight)

        self._layers = [
            PackedLayer(
                join(block.input_layernorm, *(getattr(block.self_attn, f"{name}_proj") for name in "qkv")),
                pack(block.self_attn.o_proj.weight),
                join(block.post_attention_layernorm, block.mlp.gate_proj, block.mlp.up_proj),
                pack(block.mlp.down_proj.weight),
                self._qkv_bias(block.self_attn),
                self._qk_norm(block.self_attn),
                block.self_attn.window is not None,
            )
            for block in cast("list[Block]", model.layers)
        ]
        self._head = join(model.norm, model.lm_head)
        self._embedding = model.embed_tokens.weight.detach().clone()
        self._make_rotations(min(self.config.max_position_embeddings, 1024))

    def _qkv_bias(self, attention: SelfAttention) -> Tensor | None:
        if not self.config.attention_bias:
            return None
        return torch.cat([cast("Tensor", getattr(attention, f"{name}_proj").bias) for name in "qkv"])

    def _qk_norm(self, attention: SelfAttention) -> Tensor | None:
        if not self.config.qk_norm:
            return None
        q, k = cast("Tensor", attention.q_norm.weight), cast("Tensor", attention.k_norm.weight)
        counts = self.config.num_attention_heads, self.config.num_key_value_heads
        return torch.cat([weight.expand(count, -1) for weight, count in zip((q, k), counts, strict=True)])

    def _make_rotations(self, count: int) -> None:
        """The rotation of each position below `count`, laid out as q, k and v are."""
        config, heads_k = self.config, self.config.num_key_value_heads
        positions = torch.arange(count, device=self._embedding.device)
        lengths = positions + 1  # the token of a step is the last one of its row
        tables = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling, lengths)
        cos, sin = (table[:, None].to(self._embedding.dtype) for table in tables)
        turned = torch.cat((cos, cos), -1).expand(-1, config.num_attention_heads + heads_k, -1)
        self._sin = sin.contiguous()  # (position, 1, head_dim / 2)
        self._turn = torch.cat((turned, torch.ones_like(turned[:, :heads_k])), 1)  # (position, head, head_dim)

    def _window(self, slots: NextSlots) -> tuple[int, Tensor | None]:
        """What a layer with a window sees: the first slot, and a mask of those from there on (None: all)."""
        window, slot_count = self.config.sliding_window, slots.keys[0].shape[2]
        if window is None or slots.mask is None or isinstance(slots.positions, slice):
            return max(0, slot_count - (window or slot_count)), slots.mask
        oldest = (slots.positions + 1 - window)[:, None, None, None]
        return 0, slots.mask & (torch.arange(slot_count, device=oldest.device) >= oldest)

    def _make_buffers(self, batch_size: int) -> None:
        """The results of a step, and the views of them that it needs: made once, for a view costs an operator."""
        self.batch_size = batch_size
        heads, heads_k, d = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim

        def buffer(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return self._embedding.new_empty(batch_size, *shape, dtype=dtype)

        takes = None if isinstance(self._head, Tensor) else torch.bfloat16  # the dtype of what is multiplied
        self._x, self._narrow_x = buffer(self.config.hidden_size), buffer(self.config.hidden_size, dtype=takes)
        self._hidden = buffer(self.config.intermediate_size, dtype=takes)
        self._row = self._x[0]
        self._one_row = batch_size == 1 and not self._x.is_cuda  # on a GPU, reading the number would synchronise
        self._logits = buffer(self.config.vocab_size)
        self._gate_up = buffer(2 * self.config.intermediate_size)
        self._gate, self._up = self._gate_up.chunk(2, -1)
        self._qkv, self._turned = buffer((heads + 2 * heads_k) * d), buffer(heads + 2 * heads_k, d)
        self._heads = self._qkv.view(self._turned.shape)
        self._qk = self._heads[:, : heads + heads_k]
        self._first, self._second = self._qk.chunk(2, -1)
        self._turned_first, self._turned_second = self._turned[:, : heads + heads_k].chunk(2, -1)
        # The query heads that share a KV head are the rows of one matrix, as in `attention.online.to_rows`.
        self._q = self._turned[:, :heads].unflatten(1, (heads_k, -1))
        self._new_kv = self._turned[:, heads:].unflatten(1, (2, heads_k)).transpose(0, 1)  # (2, batch, nheads_k, d)


def product(x: Tensor, weight: Matrix, out: Tensor) -> Tensor:
    """x @ weight, written to `out`."""
    if isinstance(weight, Tensor):
        return torch.mm(x, weight, out=out)
    return out.copy_(int8_product(x, *weight))


def add_product(x: Tensor, y: Tensor, weight: Matrix) -> None:
    """x += y @ weight."""
    if isinstance(weight, Tensor):
        torch.addmm(x, y, weight, out=x)
    else:
        x.add_(int8_product(y, *weight))


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ (weight · scale)ᵀ in bf16, for a matrix from `quantise_padded`."""
    padding = weight.shape[1] - x.shape[1]
    x = F.pad(x, (0, padding)) if padding else x
    return torch._weight_int8pack_mm(x.bfloat16(), weight, scale)


def quantise_padded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise`, and zeros behind each row up to a multiple of 16 numbers.

    torch's product takes 16 numbers of a row at a time and does not look where the row ends: of other widths it reads
    what lies behind, and writes garbage or ends the process (pytorch issue 136709).
    """
    narrow, scale = quantise(weight)
    return F.pad(narrow, (0, -narrow.shape[1] % INT8_STEP)), scale


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a matrix to 8 bits, with the scale of each output's largest weight (symmetric, per channel).

    Args:
        weight: (out, in).

    Returns:
        int8 (out, in), and scales (out,) in bf16, so that weight ≈ int8 · scale.
    """
    scale = (weight.abs().amax(1) / 127).bfloat16()
    return (weight / scale[:, None].clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8), scale

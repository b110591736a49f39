"""MiniLLM: the Llama architecture, small enough to read in one sitting.

Parameters carry the names that transformers gives them, so that weights move both ways unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.attention import attention
from minillm.cache.contiguous import KVCache, all_equal
from minillm.config import ModelConfig
from minillm.rope import apply_rope, rotary_tables


class MiniLLM(nn.Module):
    """A decoder-only transformer: embedding, blocks of attention and SwiGLU, RMSNorm, output matrix.

    Args:
        config: the model's shape.

    Source:
        Llama (Touvron et al., arXiv 2302.13971), section 2.2; grouped queries from arXiv 2305.13245.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(_initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | None = None,
        use_flash_attention: bool = True,
        flash_block_size: int = 128,
        attention_backend: str | None = None,
        token_mask: Tensor | None = None,
        last_token_only: bool = False,
    ) -> Tensor:
        """Next-token logits at every position.

        Args:
            input_ids: (batch, seqlen) integer token ids. With a cache, these are the new ones: a whole prompt
                (prefill), one a row (decode), or anything between (append).
            kv_cache: holds what came before, and takes in what is new.
            use_flash_attention: tiled attention when true, the naive one when false.
            flash_block_size: queries and keys in a tile of the tiled attention.
            attention_backend: any back end of `minillm.attention.attention`, instead of the two above.
            token_mask: (batch, seqlen) bool, False where a row has padding, left or right; left out: nowhere.
            last_token_only: only the logits of each row's last token.

        Returns:
            logits: (batch, seqlen, vocab_size), in the parameters' dtype, 0 at padding; with `last_token_only`,
            (batch, 1, vocab_size).

        Raises:
            ValueError: when `input_ids` has another shape, is longer than the model or the rest of the cache, or
                holds an unknown id; when `token_mask` or the cache does not fit to it; and for a row without a last
                token. The cache is then as it was.
        """
        self._check(input_ids, kv_cache, token_mask, last_token_only)
        backend = attention_backend or ("tiled" if use_flash_attention else "naive")
        options: dict[str, Any] = {"backend": backend}
        if backend == "tiled":
            options |= {"block_q": flash_block_size, "block_k": flash_block_size}
        if token_mask is not None and not token_mask.all():
            return self._forward_padded(input_ids, token_mask, kv_cache, options, last_token_only)
        return self.lm_head(self.norm(self._run(input_ids, kv_cache, options, last_token_only=last_token_only)))

    def _run(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | None,
        options: dict,
        counts: list[int] | None = None,
        last_token_only: bool = False,
    ) -> Tensor:
        """The residual stream after all layers; with `counts`, only the first tokens of each row are real."""
        past = [0] * len(input_ids) if kv_cache is None else kv_cache.lengths
        x, cos, sin = self._embed(input_ids, past)
        memory = None if kv_cache is None else Memory(kv_cache, past, counts)
        try:
            for layer in self.layers[:-1]:
                x = layer(x, cos, sin, options, memory)
            x = self.layers[-1](x, cos, sin, options, memory, last_token_only)
        except BaseException:  # a Ctrl-C too: no layer may hold more than the others
            if kv_cache is not None:
                kv_cache.truncate(past)
            raise
        return x

    def _forward_padded(
        self, input_ids: Tensor, token_mask: Tensor, kv_cache: KVCache | None, options: dict, last_token_only: bool
    ) -> Tensor:
        """All padding goes to the right, where the causal mask hides it, and the logits come back to their places."""
        order = token_mask.logical_not().sort(dim=1, stable=True).indices  # (batch, seqlen): tokens first
        counts = token_mask.sum(1)
        x = self._run(input_ids.gather(1, order), kv_cache, options, counts.tolist())
        if last_token_only:
            return self.lm_head(self.norm(x[torch.arange(len(x)), counts - 1][:, None]))
        logits = self.lm_head(self.norm(x))
        back = order.argsort(1)[..., None].expand_as(logits)
        return logits.gather(1, back).masked_fill(~token_mask[..., None], 0)

    @torch.no_grad()
    def queries_keys_values(self, input_ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each layer's attention is given for these tokens: the real input of the lessons.

        Args:
            input_ids: (batch, seqlen) integer token ids.

        Returns:
            One (q, k, v) a layer, after RoPE: q (batch, seqlen, nheads, headdim),
            k and v (batch, seqlen, nheads_k, headdim).
        """
        self._check(input_ids)
        x, cos, sin = self._embed(input_ids, [0] * len(input_ids))
        inputs = []
        for layer in cast("list[Block]", self.layers):
            inputs.append(layer.self_attn.project(layer.input_layernorm(x), cos, sin))
            x = layer(x, cos, sin, {"backend": "auto"})
        return inputs

    def _embed(self, input_ids: Tensor, past: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The embedded tokens, and the rotation of each one's position: its row's past, and on from there."""
        starts = torch.tensor(past[:1] if all_equal(past) else past, device=input_ids.device)
        positions = starts[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        return self.embed_tokens(input_ids), cos, sin

    def _check(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | None = None,
        token_mask: Tensor | None = None,
        last_token_only: bool = False,
    ) -> None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, wants (batch, seqlen)")
        if token_mask is not None and (token_mask.shape != input_ids.shape or token_mask.dtype != torch.bool):
            raise ValueError(
                f"token_mask has shape {tuple(token_mask.shape)} and {token_mask.dtype}, "
                f"wants input_ids' shape {tuple(input_ids.shape)} and torch.bool"
            )
        if last_token_only and not (input_ids.shape[1] if token_mask is None else token_mask.any(1).all()):
            raise ValueError("last_token_only wants at least one token in each row")
        if kv_cache is not None:
            kv_cache.check_fits(self.config, len(input_ids), self.embed_tokens.weight)
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens a row, "
                f"more than the model's max_position_embeddings {self.config.max_position_embeddings}"
            )
        if kv_cache is not None and input_ids.shape[1] == 1 and any(kv_cache.lengths):
            return  # decode: the id comes from our own logits, and looking at it would stall a GPU at every step
        if input_ids.numel() and not 0 <= input_ids.min() <= input_ids.max() < self.config.vocab_size:
            raise ValueError(
                f"input_ids holds ids from {input_ids.min()} to {input_ids.max()}, "
                f"the vocabulary goes from 0 to {self.config.vocab_size - 1}"
            )


@dataclass(frozen=True)
class Memory:
    """The cache in one forward: what each row held before, and how many of its new tokens are real (None: all)."""

    cache: KVCache
    past: list[int]
    counts: list[int] | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, options: dict) -> Tensor:
        """Takes k and v in, and lets q attend to all that the layer then holds, each row to its own length."""
        keys, values = self.cache.update(k, v, layer_idx, self.counts)
        if self.counts is None and all_equal(self.past):
            return attention(q, keys, values, causal=True, **options)
        out = torch.zeros_like(q)
        for row, past in enumerate(self.past):
            count = k.shape[1] if self.counts is None else self.counts[row]
            one, new, held = slice(row, row + 1), slice(count), slice(past + count)
            out[one, new] = attention(q[one, new], keys[one, held], values[one, held], causal=True, **options)
        return out


class Block(nn.Module):
    """Attention, then SwiGLU, each behind its RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        options: dict,
        memory: Memory | None = None,
        last_token_only: bool = False,
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, options, memory, last_token_only)
        x = (x[:, -1:] if last_token_only else x) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class SelfAttention(nn.Module):
    """Projections, RoPE, causal attention by whichever back end was asked for, output projection."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        options: dict,
        memory: Memory | None = None,
        last_token_only: bool = False,
    ) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        if last_token_only:  # of the last layer nobody asks for more: its keys are needed, its other queries are not
            q = q[:, -1:]
        if memory is None:
            out = attention(q, k, v, causal=True, **options)
        else:
            out = memory.attend(q, k, v, self.layer_idx, options)
        return self.o_proj(out.flatten(-2))  # (batch, seqlen, nheads, headdim) -> (batch, seqlen, width)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (batch, seqlen, nheads, headdim)
        k = self.k_proj(x).unflatten(-1, heads)  # (batch, seqlen, nheads_k, headdim)
        v = self.v_proj(x).unflatten(-1, heads)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


class SwiGLU(nn.Module):
    """The gated feed-forward: down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)

"""MiniLLM: the Llama architecture, small enough to read in one sitting.

Parameters carry the names that transformers gives them, so that weights move both ways unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.attention import Keys, attend
from minillm.attention.keys import cu_seqlens_of
from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.rope import apply_rope, rotary_tables


class MiniLLM(nn.Module):
    """A decoder-only transformer: embedding, blocks of attention and SwiGLU, RMSNorm, output matrix.

    Args:
        config: the model's shape.

    Source:
        Llama (Touvron et al., arXiv 2302.13971), section 2.2; grouped queries from arXiv 2305.13245. The options:
        Mistral 7B (arXiv 2310.06825), section 2, sliding window; Qwen2 (arXiv 2407.10671), section 2.2, biases of
        q, k and v; Qwen3 (arXiv 2505.09388), section 2, norms of q and k; the scalings of RoPE in `minillm.rope`.

    Example:
        >>> model = MiniLLM(ModelConfig.small())
        >>> model(torch.tensor([[4, 5, 6]])).shape  # logits
        torch.Size([1, 3, 1536])
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
        options: dict[str, Any] = {"backend": attention_backend or ("tiled" if use_flash_attention else "naive")}
        if options["backend"] == "tiled":
            options |= {"block_q": flash_block_size, "block_k": flash_block_size}
        if token_mask is not None and not token_mask.all():
            return self._forward_padded(input_ids, token_mask, kv_cache, options, last_token_only)
        return self.lm_head(self.norm(self._run(input_ids, kv_cache, options, last_token_only=last_token_only)))

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

    def _run(
        self,
        input_ids: Tensor,
        kv_cache: KVCache | None,
        options: dict[str, Any],
        counts: list[int] | None = None,
        last_token_only: bool = False,
    ) -> Tensor:
        """The residual stream after all layers; the arguments are those of `Step`."""
        past = [0] * len(input_ids) if kv_cache is None else kv_cache.lengths
        x, cos, sin = self._embed(input_ids, past, counts)
        step = Step(cos, sin, options, kv_cache, counts, len(self.layers) - 1 if last_token_only else None)
        try:
            for layer in self.layers:
                x = layer(x, step)
        except BaseException:  # a Ctrl-C too: no layer may hold more than the others
            if kv_cache is not None:
                kv_cache.truncate(past)
            raise
        return x

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
        step = Step(cos, sin, {"backend": "auto"})
        inputs = []
        for layer in cast("list[Block]", self.layers):
            inputs.append(layer.self_attn.project(layer.input_layernorm(x), cos, sin))
            x = layer(x, step)
        return inputs

    def _embed(
        self, input_ids: Tensor, past: list[int], counts: list[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The embedded tokens, and the rotation of each one's position: its row's past, and on from there."""
        starts = torch.tensor(past[:1] if len(set(past)) == 1 else past, device=input_ids.device)[:, None]
        positions = starts + torch.arange(input_ids.shape[1], device=input_ids.device)
        new = input_ids.shape[1] if counts is None else torch.tensor(counts, device=input_ids.device)[:, None]
        config = self.config
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling, starts + new)
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
class Step:
    """What one forward carries through all layers beside the residual stream.

    Args:
        cos, sin: rotations of the tokens' positions, from `rotary_tables`.
        options: of `minillm.attention.attend`, the back end among them.
        kv_cache: holds what came before, and takes in what is new; None: there is nothing before.
        counts: how many of each row's tokens are real, the first ones; None where all are.
        trimmed_layer: the layer that goes on with each row's last token alone; None for no layer.
    """

    cos: Tensor
    sin: Tensor
    options: dict[str, Any]
    kv_cache: KVCache | None = None
    counts: list[int] | None = None
    trimmed_layer: int | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_idx: int, window: int | None = None) -> Tensor:
        """Causal attention of the new tokens to themselves and to what the cache's layer holds, which takes them in.

        Args:
            q, k, v: (batch, seqlen, heads, headdim), of the new tokens.
            layer_idx: the cache's layer.
            window: tokens that a query sees, itself included; None for all before it.
        """
        left = -1 if window is None else window - 1  # flash-attn's window counts the keys beside the query's position
        options = self.options | {"causal": True, "window_size": (left, -1)}
        if self.kv_cache is None:
            return attend(q, Keys(k, v), **options)
        keys = self.kv_cache.append(k, v, layer_idx, self.counts)
        if self.counts is None:
            return attend(q, keys, **options)
        real = torch.arange(q.shape[1], device=q.device) < torch.tensor(self.counts, device=q.device)[:, None]
        cu_seqlens_q = cu_seqlens_of(self.counts, q.device)
        out = torch.zeros_like(q)
        out[real] = attend(q[real], keys, cu_seqlens_q=cu_seqlens_q, **options)
        return out

    def trim(self, x: Tensor, layer_idx: int) -> Tensor:
        """(batch, seqlen, …) -> (batch, 1, …) in the layer behind which the last tokens alone are needed, else x."""
        return x[:, -1:] if layer_idx == self.trimmed_layer else x


class Block(nn.Module):
    """Attention, then SwiGLU, each behind its RMSNorm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        x = step.trim(x, self.layer_idx) + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class SelfAttention(nn.Module):
    """Projections, RoPE, causal attention by whichever back end was asked for, output projection."""

    def __init__(self, config: ModelConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.window(layer_idx)
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, step: Step) -> Tensor:
        q, k, v = self.project(x, step.cos, step.sin)
        q = step.trim(q, self.layer_idx)  # keys and values of all tokens are still needed
        out = step.attend(q, k, v, self.layer_idx, self.window)  # (batch, seqlen, nheads, headdim)
        return self.o_proj(out.flatten(-2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (batch, seqlen, nheads, headdim), k and v (batch, seqlen, nheads_k, headdim); q and k after RoPE."""
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (batch, seqlen, nheads, headdim)
        k = self.k_proj(x).unflatten(-1, heads)  # (batch, seqlen, nheads_k, headdim)
        v = self.v_proj(x).unflatten(-1, heads)
        return apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin), v


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
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)

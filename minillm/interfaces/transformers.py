"""Our attention inside a model of Hugging Face's transformers: registered under a name, with the mask that it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from minillm.attention.backends import attention, attention_varlen
from minillm.attention.keys import cu_seqlens_of

HARMLESS = {  # what transformers' layers pass on, and what changes nothing here: positions are in the keys already
    "cache_position",
    "deterministic",
    "logits_to_keep",
    "mm_token_type_ids",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}


def register_with_transformers(name: str = "minillm", backend: str = "auto") -> str:
    """Makes our attention known to transformers; a model takes it with `attn_implementation=name`.

    A model gets the logits of its own eager attention where its mask is causal, a sliding window, or bidirectional,
    with or without padding. What else a model asks for raises a ValueError in its forward, which names it and an
    implementation that the model has: attention in chunks, packed sequences, blocks that see each other, a mask of
    your own, a static cache, attention sinks, biases, dropout, and models that add the mask to the scores themselves.
    A family that has its own attention only, and looks it up by name (Falcon, GPT-J), ends in transformers' KeyError.

    Args:
        name: to register; registering again replaces it.
        backend: as in `attention`.

    Returns:
        The name.

    Raises:
        ImportError: where transformers is not installed.

    Source:
        transformers, `AttentionInterface` and `AttentionMaskInterface`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, partial(_attend, backend=backend))
    AttentionMaskInterface.register(name, _describe_mask)
    return name


@dataclass(frozen=True, eq=False)
class Mask:
    """A model's mask in words instead of a tensor: it travels from transformers' mask function to our attention.

    A model that passes it on gives proof that it asked for the mask in this forward. One that computes with it would
    take it for the scores' mask, which it is not: every such attempt raises a ValueError.

    Args:
        q_length, kv_length: of the queries and keys that it is for.
        causal: the last query sees the last key, and each query before it one key less.
        window: how many keys a query sees, its own included; None for all.
        real: (batch, kv_length) bool, which keys are tokens and no padding; None where all are.
    """

    q_length: int
    kv_length: int
    causal: bool = True
    window: int | None = None
    real: Tensor | None = None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _UsedAsTensor(
            "attention_mask: this model computes with its mask itself, and this attention has no mask as a tensor. "
            "Take attn_implementation='eager'"
        )

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse(None)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __invert__ = __neg__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _refuse
    __hash__ = object.__hash__


class _UsedAsTensor(ValueError, AttributeError):
    """A ValueError for callers, and an AttributeError so that `hasattr` answers."""


def _describe_mask(
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Mask:
    """The mask that transformers wants drawn, as a `Mask`.

    Raises:
        ValueError: where it is none of those that `register_with_transformers` accepts.

    Source:
        transformers, `masking_utils.sdpa_mask`, which is called alike.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if attention_mask is not None and attention_mask.ndim != 2:
        _refuse(f"attention_mask has shape {tuple(attention_mask.shape)}, wants (batch, seqlen) of 0 and 1", config)
    real = None
    if attention_mask is not None and kv_length:
        missing = max(kv_offset + kv_length - attention_mask.shape[1], 0)
        real = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
        if real.all():
            real = None
    if mask_function is bidirectional_mask_function:
        return Mask(q_length, kv_length, causal=False, real=real)
    if q_offset + q_length != kv_offset + kv_length:
        _refuse(
            f"past_key_values or attention_mask: there are {kv_offset + kv_length} keys, and the last query is number "
            f"{int(q_offset) + q_length}, as with a static cache; this attention takes a dynamic one",
            config,
        )
    window = local_size if local_size is not None and local_size < kv_length else None
    if mask_function not in (None, causal_mask_function):
        grid = dict(kwargs, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
        if not _is_causal_in(window, mask_function, local_size, grid | {"attention_mask": attention_mask}):
            names = ", ".join(dict.fromkeys(part for part in _parts(mask_function) if isinstance(part, str)))
            _refuse(
                f"mask_function ({names}): this attention takes causal, sliding-window and padding masks, and not "
                "chunks, packed sequences (position_ids that begin anew), blocks that see each other or a mask of "
                "your own",
                config,
            )
    if window and real is not None and (real.int().diff(dim=1) == 1).sum(1).add(real[:, 0]).gt(1).any():
        _refuse("attention_mask has padding between tokens of a row, and the sliding window counts it as keys", config)
    return Mask(q_length, kv_length, True, window, real)


def _is_causal_in(window: int | None, mask_function: Any, local_size: int | None, grid: dict[str, Any]) -> bool:
    """Whether a mask function is causal within a window: by what it is made of, else by its whole grid."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

    if local_size is not None and _parts(mask_function) == _parts(sliding_window_causal_mask_function(local_size)):
        return True
    plain = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    grid = {"batch_size": 1} | grid | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    asked, ours = (sdpa_mask(**grid, mask_function=function) for function in (mask_function, plain))
    return torch.equal(*torch.broadcast_tensors(asked, ours))


def _parts(mask_function: Any) -> list[str | int]:
    """What transformers made a mask function of: ["and_masks", "sliding_window_overlay", 5, "causal_mask_function"]."""
    if isinstance(mask_function, tuple):
        return [part for function in mask_function for part in _parts(function)]
    if not callable(mask_function):
        return [mask_function if isinstance(mask_function, int) else id(mask_function)]
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".")[0]
    home = getattr(mask_function, "__module__", "")
    own = [name if home == "transformers.masking_utils" else f"{home}.{name}"]
    return own + [
        part for cell in getattr(mask_function, "__closure__", None) or () for part in _parts(cell.cell_contents)
    ]


def _refuse(what: str, config: Any) -> NoReturn:
    """Raises ValueError with what was not accepted, and the fastest implementation that this model has."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    models = [
        mapping[type(config)] for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING) if type(config) in mapping
    ]
    instead = "sdpa" if models and all(getattr(model, "_supports_sdpa", False) for model in models) else "eager"
    raise ValueError(f"{what}. Take attn_implementation='{instead}'")


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    *,
    backend: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as a transformers layer calls it.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key: (batch, nheads_k, seqlen_k, headdim), the cached ones included.
        value: (batch, nheads_k, seqlen_k, headdim_v).
        attention_mask: from `_describe_mask`; None only in a layer that is not causal, which then sees all keys.
        scaling, dropout, sliding_window, softcap, is_causal, kwargs: the layer's.

    Returns:
        (batch, seqlen_q, nheads, headdim_v), 0 where a query is padding; and None for the probabilities.
    """
    for argument, given in kwargs.items():
        if argument not in HARMLESS and given is not None and given is not False:
            raise ValueError(f"{argument} is not supported by this attention. Take attn_implementation='eager'")
    if dropout:
        raise ValueError(
            f"dropout is not supported by this attention, and this layer has {dropout}. Take model.eval(), "
            "attention_dropout=0 in the config, or attn_implementation='eager'"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and not causal:
        attention_mask = Mask(query.shape[2], key.shape[2], causal=False)
    mask = _checked(attention_mask, query, key, sliding_window, getattr(module, "config", None))
    options: dict[str, Any] = dict(
        causal=mask.causal,
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window_size=(-1 if mask.window is None else mask.window - 1, -1),  # transformers counts the query's own
        softcap=softcap or 0.0,
        backend=backend,
    )
    width = max(query.shape[-1], value.shape[-1])  # DeepSeek's values are narrower than its keys: 0 adds nothing
    q, k, v = (torch.nn.functional.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in (query, key, value))
    out = attention(q, k, v, **options) if mask.real is None else _without_padding(q, k, v, mask, options)
    return out[..., : value.shape[-1]], None


def _checked(mask: Any, query: Tensor, key: Tensor, sliding_window: int | None, config: Any) -> Mask:
    """The mask; raises ValueError where it is not from `_describe_mask`, or not for these queries, keys and window."""
    if mask is None:
        _refuse(
            "attention_mask is None: this model does not ask for its mask, and padding could be attended to", config
        )
    if not isinstance(mask, Mask):
        what = f"a {mask.dtype} tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"{mask!r:.80}"
        _refuse(
            f"attention_mask is {what}: this attention takes no mask of your own, only (batch, seqlen) of 0 and 1",
            config,
        )
    if (mask.q_length, mask.kv_length) != (query.shape[2], key.shape[2]):
        _refuse(
            f"attention_mask is for {mask.q_length} queries and {mask.kv_length} keys, and this layer has "
            f"{query.shape[2]} and {key.shape[2]}",
            config,
        )
    if mask.real is not None and len(mask.real) != len(query):
        _refuse(f"attention_mask has batch {len(mask.real)}, and this layer has {len(query)}", config)
    if sliding_window is not None and sliding_window < key.shape[2] and sliding_window != mask.window:
        _refuse(f"sliding_window is {sliding_window}, and the mask of this layer has {mask.window}", config)
    return mask


def _without_padding(q: Tensor, k: Tensor, v: Tensor, mask: Mask, options: dict[str, Any]) -> Tensor:
    """The tokens as a ragged batch: padding is neither read nor computed, and the causal mask aligns by itself."""
    real_k = mask.real.to(q.device)  # type: ignore[union-attr]
    real_q = real_k[:, -q.shape[1] :] if mask.causal else real_k.new_ones(q.shape[:2])  # the last positions, or any
    out = torch.zeros_like(q)
    out[real_q] = attention_varlen(
        q[real_q], k[real_k], v[real_k], *(cu_seqlens_of(real.sum(1)) for real in (real_q, real_k)), **options
    )
    return out

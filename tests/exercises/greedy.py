"""Answers to `greedy`, a writing stop of lesson 04."""

import torch

from tests.exercises.answers import Wrong, changed, defined

FIRST_THE_PROMPT = """
from minillm.cache import KVCache
def greedy(model, input_ids, max_new_tokens):
    cache = KVCache(model.config, batch_size=1)
    logits = model(input_ids, kv_cache=cache)
    ids = []
    for _ in range(max_new_tokens):
        ids.append(logits[0, -1].argmax().item())
        logits = model(torch.tensor([ids[-1:]]), kv_cache=cache)
    return ids
"""
AS_A_TENSOR = """
from minillm.cache import KVCache
@torch.no_grad()
def greedy(model, input_ids, max_new_tokens):
    cache, ids = KVCache(model.config, 1, capacity=8), [input_ids]
    while len(ids) <= max_new_tokens:
        ids.append(model(ids[-1], kv_cache=cache)[:, -1:].topk(1).indices[..., 0])
    return torch.cat(ids[1:], dim=1)
"""
first_the_prompt, as_a_tensor = (defined(source, "greedy") for source in (FIRST_THE_PROMPT, AS_A_TENSOR))

RIGHT = {"first the prompt": first_the_prompt, "as a tensor": as_a_tensor}


def slip(source: str, old: str, new: str, *, name: str, told: str) -> Wrong:
    """An answer with some words changed."""
    assert old in source
    return Wrong(name, defined(source.replace(old, new), "greedy"), told)


def no_cache(model, input_ids, max_new_tokens):
    """Right, and quadratic."""
    n = input_ids.shape[1]
    for _ in range(max_new_tokens):
        token = model(input_ids)[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, token], dim=1)
    return input_ids[0, n:].tolist()


WRONG = [
    Wrong("no cache", no_cache, "45 tokens went through the model, and 10 are enough"),
    changed(no_cache, "input_ids[0, n:]", "input_ids[0]", name="with the prompt", told="the prompt is returned too"),
    slip(FIRST_THE_PROMPT, ", kv_cache=cache", "", name="forgets", told="and no cache"),
    slip(
        AS_A_TENSOR,
        "ids[-1], kv_cache",
        "torch.cat(ids, 1), kv_cache",
        name="all again",
        told="the cache holds it twice",
    ),
    slip(
        AS_A_TENSOR,
        "model(ids[-1]",
        "model(input_ids",
        name="not fed back",
        told="the prompt is fed again at each step",
    ),
    slip(
        FIRST_THE_PROMPT,
        "logits[0, -1]",
        "logits[0, 0]",
        name="first position",
        told="the logits of the first position",
    ),
    slip(FIRST_THE_PROMPT, "argmax()", "argmin()", name="smallest", told="the smallest logit"),
    slip(FIRST_THE_PROMPT, "argmax()", "amax()", name="value for id", told="for an id"),
    slip(FIRST_THE_PROMPT, "return ids", "return ids[1:]", name="first missing", told="the first new token is missing"),
    slip(
        FIRST_THE_PROMPT,
        "range(max_new_tokens)",
        "range(max_new_tokens - 1)",
        name="last missing",
        told="the last new token",
    ),
    slip(
        FIRST_THE_PROMPT,
        "range(max_new_tokens)",
        "range(max_new_tokens + 1)",
        name="too many",
        told="one token too many",
    ),
    slip(FIRST_THE_PROMPT, "    return ids\n", "", name="no return", told="is there a `return`"),
    slip(FIRST_THE_PROMPT, "[ids[-1:]]", "ids[-1:]", name="one axis", told="wants (1, seqlen)"),
]

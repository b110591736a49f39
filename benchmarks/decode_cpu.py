"""Generation on the CPU against its limits: `make bench`, or `python -m benchmarks.decode_cpu`.

One model of 28 million parameters, the same weights everywhere, batch 1, greedy, fp32, after a prompt of 128 tokens:

- floor: all that a step has to read, streamed through bare products: the weights, each matrix transposed in memory, and
  the keys and values so far; the same with weights in 8 bits;
- weights alone: without keys and values; also in 8 bits, and as `F.linear`, each matrix as a model stores it;
- ours: `TextGenerator`, and with weights="int8";
- transformers: `generate` of Hugging Face's Llama, with SDPA and its dynamic cache.

They run in turns, and each ratio is taken within a turn. Only decode steps are timed, from the end of the prefill on.
Then the prefill of 1,024 tokens; the rate over the length of the context: floor, with a cache, without one, and
transformers; and the tiled attention by its block size. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from statistics import median
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from benchmarks.record import ratio, save, spread, take_turns
from minillm import MiniLLM, ModelConfig
from minillm.attention import flash_attention
from minillm.cache import KVCache
from minillm.checkpoint import to_transformers
from minillm.decode import quantise
from minillm.generate import TextGenerator
from minillm.model import Block

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)
PROMPT, PREFILL = 128, 1024
Products = tuple[Callable[[], Tensor], ...]
BLOCKS = (32, 64, 128, 256, 512)
CONTEXTS = (64, 128, 256, 512, 1024, 2000)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each turn")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = MiniLLM(CONFIG).eval()
    decode = measure_decode(model, options.rounds, options.tokens)
    prefill = measure_prefill(model, max(4, options.rounds // 2))
    curve = measure_curve(model)
    figures = {"decode": decode, "prefill": prefill, "context": curve, "blocks": measure_blocks()}
    print("\nwritten to", save("decode_cpu", figures))


def measure_decode(model: MiniLLM, rounds: int, tokens: int) -> dict:
    """Tokens/s of ours, the floors and transformers, measured in turns: each one's spread, and their ratios."""
    theirs = to_transformers(model).eval()
    same, int8 = TextGenerator(model), TextGenerator(model, weights="int8")
    ids = prompt(PROMPT)
    runs = {
        "floor": lambda: floor_rate(with_attention(transposed_products(model), PROMPT), tokens),
        "floor, int8": lambda: floor_rate(with_attention(int8_products(model), PROMPT), tokens),
        "weights alone": lambda: floor_rate(transposed_products(model), tokens),
        "weights alone, int8": lambda: floor_rate(int8_products(model), tokens),
        "F.linear": lambda: floor_rate(linear_products(model), tokens),
        "ours": lambda: our_rate(same, ids, tokens),
        "ours, int8": lambda: our_rate(int8, ids, tokens),
        "transformers": lambda: their_rate(theirs, ids, tokens),
    }
    results = take_turns(runs, rounds)
    print(f"decode after {PROMPT} tokens: tokens/s, median of {rounds} turns (10th to 90th percentile)")
    for name, figures in results.items():
        print(f"  {name:19} {in_words(spread(figures), '6.1f')}")
    ratios = {
        f"{name} / {to}": ratio(results, name, to)
        for name, to in (
            ("ours", "floor"),
            ("ours", "weights alone"),
            ("ours", "F.linear"),
            ("ours", "transformers"),
            ("ours, int8", "floor, int8"),
            ("ours, int8", "weights alone, int8"),
            ("ours, int8", "ours"),
            ("ours, int8", "transformers"),
        )
    }
    for name, quotient in ratios.items():
        print(f"  {name:32} {in_words(quotient, '5.2f')}")
    return {"tokens per second": {name: spread(figures) for name, figures in results.items()}, "ratios": ratios}


def measure_prefill(model: MiniLLM, rounds: int) -> dict:
    """Prompt tokens/s of ours and of transformers, measured in turns."""
    theirs = to_transformers(model).eval()
    ids = prompt(PREFILL)

    def ours() -> float:
        start = time.perf_counter()
        model(ids, KVCache(CONFIG, 1, capacity=PREFILL), attention_backend="auto", last_token_only=True)
        return PREFILL / (time.perf_counter() - start)

    def transformers() -> float:
        start = time.perf_counter()
        theirs(ids, use_cache=True, logits_to_keep=1)
        return PREFILL / (time.perf_counter() - start)

    results = take_turns({"ours": ours, "transformers": transformers}, rounds)
    against = ratio(results, "ours", "transformers")
    print(f"prefill of {PREFILL} tokens: tokens/s")
    for name, figures in results.items():
        print(f"  {name:14} {in_words(spread(figures), '6.0f')}")
    print(f"  {'ours / transformers':26} {in_words(against, '5.2f')}")
    rates = {name: spread(figures) for name, figures in results.items()}
    return {"tokens per second": rates, "ours / transformers": against}


def measure_curve(model: MiniLLM, tokens: int = 12, rounds: int = 9) -> dict:
    """Tokens a second by name, one for each length: the medians, and under "p10" and "p90" the same for the spread."""
    theirs, generator = to_transformers(model).eval(), TextGenerator(model)
    names = ("floor", "cached", "uncached", "transformers")
    curve: dict = {name: [] for name in names}
    curve |= {"length": list(CONTEXTS), "p10": {name: [] for name in names}, "p90": {name: [] for name in names}}
    curve["cached / floor"] = []
    print("tokens/s by tokens in the context")
    for length in CONTEXTS:
        ids = prompt(length)
        products = with_attention(transposed_products(model), length)
        runs = {
            "floor": lambda products=products: floor_rate(products, tokens),
            "cached": lambda ids=ids: our_rate(generator, ids, tokens),
            "uncached": lambda ids=ids: uncached_rate(model, ids),
            "transformers": lambda ids=ids: their_rate(theirs, ids, tokens),
        }
        results = take_turns(runs, rounds)
        curve["cached / floor"].append(ratio(results, "cached", "floor"))
        spreads = {name: spread(figures) for name, figures in results.items()}
        for name, figures in spreads.items():
            curve[name].append(round(figures["median"], 2))
            for bound in ("p10", "p90"):
                curve[bound][name].append(round(figures[bound], 2))
        print(f"  {length:5}", *(f"{name} {in_words(figures, '7.1f')}" for name, figures in spreads.items()))
        print(f"        cached / floor {in_words(curve['cached / floor'][-1], '5.2f')}")
    return curve


def measure_blocks(rounds: int = 7) -> dict:
    """Milliseconds of one layer's tiled attention over a prompt, by its block size."""
    results = {}
    print("tiled attention of one layer: milliseconds by block size")
    for length in (256, 1024, 2048):
        q, k, v = (torch.randn(1, length, heads, 64) for heads in (8, 4, 4))

        def run(block: int, qkv=(q, k, v)) -> float:
            start = time.perf_counter()
            flash_attention(*qkv, causal=True, block_q=block, block_k=block)
            return 1000 * (time.perf_counter() - start)

        runs = {f"{block}": lambda block=block: run(block) for block in BLOCKS}
        results[f"{length}"] = {block: round(median(ms), 2) for block, ms in take_turns(runs, rounds).items()}
        print(f"  {length:5}", *(f"{block}: {ms:.1f}" for block, ms in results[f"{length}"].items()))
    return results


def prompt(length: int) -> Tensor:
    """Random token ids, (1, length)."""
    return torch.randint(CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def floor_rate(products: Products, tokens: int) -> float:
    """Steps a second of bare products."""
    start = time.perf_counter()
    for _ in range(tokens):
        for product in products:
            product()
    return tokens / (time.perf_counter() - start)


@cache
def with_attention(products: Products, length: int) -> Products:
    """Behind each layer's first product those of one query with the keys and values of so many tokens."""
    layers, heads_k, d = CONFIG.num_hidden_layers, CONFIG.num_key_value_heads, CONFIG.head_dim
    rows = CONFIG.num_attention_heads // heads_k  # query heads that share a KV head are the rows of one product
    q, shares = torch.randn(heads_k, rows, d), torch.rand(heads_k, rows, length)
    both = list(products)
    for layer, (keys, values) in reversed(list(enumerate(torch.randn(layers, 2, heads_k, length, d)))):
        behind = 4 * layer + 1
        both[behind:behind] = partial(torch.bmm, q, keys.transpose(1, 2)), partial(torch.bmm, shares, values)
    return tuple(both)


@cache
def linear_products(model: MiniLLM) -> Products:
    """The products of a step: q, k and v as one matrix, gate and up as one."""
    return tuple(partial(F.linear, torch.randn(1, weight.shape[1]), weight) for weight in floor_weights(model))


@cache
def transposed_products(model: MiniLLM) -> Products:
    """The same, each matrix stored (in, out), as `minillm.decode` has it: a CPU streams one way faster."""
    weights = floor_weights(model)
    return tuple(partial(torch.mm, torch.randn(1, weight.shape[1]), weight.t().contiguous()) for weight in weights)


@cache
def int8_products(model: MiniLLM) -> Products:
    """The same with 8-bit weights, as `minillm.decode` makes them."""
    products: list[Callable[[], Tensor]] = []
    for weight in floor_weights(model):
        x = torch.randn(1, weight.shape[1], dtype=torch.bfloat16)
        products.append(partial(torch._weight_int8pack_mm, x, *quantise(weight)))
    return tuple(products)


def floor_weights(model: MiniLLM) -> list[Tensor]:
    """The weight matrices of a decode step; those that share an input are joined."""
    weights = []
    for block in cast("list[Block]", model.layers):
        attention, mlp = block.self_attn, block.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weights += [qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight]
    return [*weights, model.lm_head.weight]


def our_rate(generator: TextGenerator, ids: Tensor, tokens: int) -> float:
    """Tokens a second after the first one, which the prefill gives."""
    stream = generator.stream(ids, tokens + 1, temperature=0, stop_tokens=())
    next(stream)
    start = time.perf_counter()
    written = sum(1 for _ in islice(stream, tokens))
    return written / (time.perf_counter() - start)


def their_rate(model, ids: Tensor, tokens: int) -> float:
    """The same for transformers."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    clock = Clock()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens + 1, do_sample=False, streamer=clock)
    _, first, *_, last = clock.times  # the prompt is put before the first token
    return tokens / (last - first)


class Clock(BaseStreamer):
    """A transformers streamer that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def uncached_rate(model: MiniLLM, ids: Tensor) -> float:
    """Without a cache, each token is a forward over all the context."""
    start = time.perf_counter()
    model(ids, attention_backend="auto", last_token_only=True)
    return 1 / (time.perf_counter() - start)


def in_words(figures: dict[str, float], form: str) -> str:
    """A spread as text: the median, and in brackets the 10th and 90th percentiles."""
    return f"{figures['median']:{form}}  ({figures['p10']:{form}} to {figures['p90']:{form}})"


if __name__ == "__main__":
    main()

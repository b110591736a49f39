"""Text from a model: prefill the prompt once, then one token after another. `python -m minillm.generate "…"`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from typing import get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minillm.cache import KVCache
from minillm.changes import Plain, check_layers, weights_of
from minillm.checkpoint import load_checkpoint
from minillm.corpus import BOT, SPECIAL_TOKENS, user_turn, what_can_be_said
from minillm.decode import Decoder, Weights
from minillm.ids import as_prompts, as_stop_tokens
from minillm.measure.profiler import Reads, phase, profile
from minillm.model import MiniLLM
from minillm.sampling import check_sampling, sample


class TextGenerator:
    """Writes on from prompts, with a KV cache.

    Each call looks whether the weights are those that were packed, and packs them again where they changed. A model
    with hooks, adapters or other modules runs its own forward at every step. Several threads may call one generator:
    they share the packed weights, and each text has buffers of its own.

    Args:
        model, tokenizer: left out, those of the shipped checkpoint. Without a tokenizer, a model writes ids only.
        use_flash_attention: fused attention and the packed `Decoder`; false runs every step through the model's
            own forward with the naive attention.
        weights: "same", or "int8" for the decode steps, as in `Decoder`, which they need.

    Attributes:
        stop_tokens: the ids that end a text where a call names none: `model.config.eos_token_ids`; where it has none,
            the end of a turn in the tokenizer that this course trains; else no id at all.

    Raises:
        ValueError: where `weights` is unknown, or not "same" without the `Decoder`; or a tokenizer comes without its
            model.
        TypeError: where `model` or `tokenizer` is of another library.

    Example:
        >>> generator = TextGenerator()
        >>> generator.answer("My favourite dish is ramen. What is my favourite dish?", temperature=0)
        'Your favourite dish is ramen.'
    """

    def __init__(
        self,
        model: MiniLLM | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        use_flash_attention: bool = True,
        weights: Weights = "same",
    ):
        if not use_flash_attention and weights != "same":
            raise ValueError(f"weights is {weights!r}, wants 'same' where use_flash_attention is False")
        if weights not in get_args(Weights):
            raise ValueError(f"weights is {weights!r}, wants one of {', '.join(get_args(Weights))}")
        _check_parts(model, tokenizer)
        if model is None:
            model, tokenizer = load_checkpoint()
        self.model, self.tokenizer = model, tokenizer
        self._backend = "auto" if use_flash_attention else "naive"
        self._weights = weights
        self._plain = Plain(model.config)
        self._packed = (weights_of(model), Decoder(model, weights)) if self._can_pack() else None

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Where a row ends unless it is told otherwise: the model's end ids, else the end mark of our dialogues."""
        config_has = getattr(self.model.config, "eos_token_ids", ())
        return tuple(config_has) or tuple(self._dialogue_ids[-1:])

    def generate(self, prompt_ids, max_new_tokens: int = 50, temperature: float = 0.8, **options):
        """The tokens that follow one prompt, or each of several.

        Args:
            prompt_ids: the ids of one prompt, as a sequence of int, a Tensor or an array (seqlen,); or several prompts,
                as a sequence of such or (batch, seqlen). They need not be equally long.
            max_new_tokens: at most so many are written.
            temperature: as in `minillm.sampling`; 0 is greedy.
            options: as in `stream`.

        Returns:
            list[int] for one prompt, a list of them for several; without the stop token.

        Raises:
            TypeError, ValueError: as `stream`.
        """
        prompts, single = as_prompts(prompt_ids)
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, temperature, **options):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows[0] if single else rows

    def stream(
        self,
        prompt_ids,
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop_tokens: int | Iterable[int] | Tensor | None = None,
        seed: int | None = None,
    ) -> Iterator[list[int | None]]:
        """The same, token by token, as soon as each is there.

        Args:
            prompt_ids, max_new_tokens, temperature: as in `generate`.
            top_k, top_p, min_p: as in `minillm.sampling`.
            stop_tokens: a row ends where the model chooses one of these: an id, or a sequence, a set or a Tensor of
                them; () for none. Left out: `self.stop_tokens`.
            seed: of the draws; the same seed, prompts and machine give the same tokens.

        Yields:
            A token for each prompt, None for those that have ended; until all have.

        Raises:
            TypeError: where `prompt_ids` or `stop_tokens` are no ids.
            ValueError: where a prompt is empty, too long for the model together with `max_new_tokens`, or holds
                an unknown id; for an option that makes no sense; and where weights="int8" cannot stand for the model,
                because it has hooks or adapters now. Before the first token, in the call itself.
        """
        prompts, _ = as_prompts(prompt_ids)
        check_sampling(temperature, top_k, top_p, min_p)
        self._check(prompts, max_new_tokens, seed)
        sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        vocab_size = self.model.config.vocab_size
        stops = frozenset(self.stop_tokens if stop_tokens is None else as_stop_tokens(stop_tokens, vocab_size))
        self._can_pack()  # or raises, here and not at the first token
        return self._stream(prompts, max_new_tokens, sampling, stops, seed)

    def stream_text(self, text: str, max_new_tokens: int = 50, temperature: float = 0.8, **options) -> Iterator[str]:
        """The model's answer to a user's text, in pieces.

        Args:
            text: any Unicode characters; those outside the vocabulary are encoded byte by byte.
            max_new_tokens, temperature, options: as in `stream`.

        Raises:
            ValueError: as `stream`; where the text is blank or holds a mark that separates turns; and where the
                tokenizer does not know those marks.
        """
        if self.tokenizer is None:
            raise ValueError("tokenizer is None: text needs one, give it to TextGenerator beside the model")
        if not self._dialogue_ids:
            raise ValueError(
                f"tokenizer has no tokens {', '.join(SPECIAL_TOKENS)}, between which this course's models read a text: "
                "encode the prompt yourself and call generate(tokenizer.encode(text).ids)"
            )
        if not text.strip():
            raise ValueError("text is blank: say something")
        if any("\ud800" <= character <= "\udfff" for character in text):  # surrogates: bytes that were not UTF-8
            raise ValueError("text is not Unicode: write it in UTF-8")
        for mark in SPECIAL_TOKENS:
            if mark in text:
                raise ValueError(f"text holds {mark!r}, which separates the turns of a dialogue: leave it out")
        prompt = self.tokenizer.encode(user_turn([text]) + BOT).ids
        return self._pieces(self.stream(prompt, max_new_tokens, temperature, **options))

    def answer(self, text: str, max_new_tokens: int = 50, temperature: float = 0.8, **options) -> str:
        """The whole answer of `stream_text`."""
        return "".join(self.stream_text(text, max_new_tokens, temperature, **options)).strip()

    @property
    def _dialogue_ids(self) -> list[int]:
        """The ids of the marks that separate turns, the end of one last; none where the tokenizer lacks one of them."""
        if self.tokenizer is None:
            return []
        ids = [self.tokenizer.token_to_id(mark) for mark in SPECIAL_TOKENS]
        known = [token for token in ids if token is not None]
        return known if len(known) == len(ids) else []

    def _can_pack(self) -> bool:
        """Whether a `Decoder` may stand for the model's forward; raises ValueError where it may not and has to."""
        check_layers(self.model)
        if self._backend == "naive":
            return False
        if self._plain.config is not self.model.config:
            self._plain = Plain(self.model.config)
        reason = self._plain.why_not(self.model)
        if reason and self._weights != "same":
            raise ValueError(f"weights is {self._weights!r}, and {reason}: take 'same', for the model's own forward")
        return reason is None

    def _decoder(self) -> Decoder | None:
        """A decoder of the weights as they are now, with buffers of its own; None for the model's own forward.

        Two threads may both pack new weights: one pays twice, and both are right.
        """
        if not self._can_pack():
            return None
        weights, packed = weights_of(self.model), self._packed
        if packed is None or packed[0] != weights:
            packed = self._packed = (weights, Decoder(self.model, self._weights))
        return packed[1].fork()

    def _stream(self, prompts, max_new_tokens, sampling, stop_tokens, seed) -> Iterator[list[int | None]]:
        decoder, device = self._decoder(), self.model.embed_tokens.weight.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        capacity = max(map(len, prompts)) + max_new_tokens
        dtype = cache_dtype(self.model.embed_tokens.weight, decoder)
        cache = KVCache(self.model.config, len(prompts), capacity=capacity, dtype=dtype, device=device)
        running = [True] * len(prompts)
        logits = self._prefill(prompts, cache)
        for written in range(1, max_new_tokens + 1):
            chosen = sample(logits, **sampling, generator=generator)
            tokens = chosen.tolist()
            running = [go_on and token not in stop_tokens for go_on, token in zip(running, tokens, strict=True)]
            if not any(running):
                return
            yield [token if go_on else None for go_on, token in zip(running, tokens, strict=True)]
            if written < max_new_tokens:
                logits = self._step(decoder, chosen, cache, sum(running))

    @torch.no_grad()
    def _prefill(self, prompts: list[list[int]], cache: KVCache) -> Tensor:
        longest = max(map(len, prompts))
        device = self.model.embed_tokens.weight.device
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        ends = torch.tensor([len(prompt) for prompt in prompts], device=device)
        token_mask = torch.arange(longest, device=device) < ends[:, None]
        with phase("prefill", sum(map(len, prompts)), lambda: Reads(self._weight_bytes)):
            logits = self.model(
                ids, cache, attention_backend=self._backend, token_mask=token_mask, last_token_only=True
            )
        return logits[:, 0]

    def _step(self, decoder: Decoder | None, token_ids: Tensor, cache: KVCache, running: int) -> Tensor:
        """Rows that have ended are carried along: a step costs nearly the same without them."""

        def reads() -> Reads:
            return Reads(self._weight_bytes if decoder is None else decoder.nbytes, cache.used_bytes)

        with phase("decode", running, reads):
            if decoder is not None:
                return decoder.step(token_ids, cache)
            with torch.no_grad():
                return self.model(token_ids[:, None], cache, attention_backend=self._backend)[:, 0]

    @property
    def _weight_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def _pieces(self, stream: Iterator[list[int | None]]) -> Iterator[str]:
        """Text as it grows; a character of several tokens is held back until its last byte is there."""
        assert self.tokenizer is not None
        ids: list[int] = []
        shown = ""
        for (token,) in stream:
            assert token is not None
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        if text := self.tokenizer.decode(ids)[len(shown) :]:
            yield text

    def _check(self, prompts: list[list[int]], max_new_tokens: int, seed: int | None) -> None:
        limit, vocab_size = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, wants 1 or more")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed is {seed}, wants a number of 64 bits")
        for row, prompt in enumerate(prompts):
            which = f"prompt_ids[{row}]" if len(prompts) > 1 else "prompt_ids"
            if not prompt:
                raise ValueError(f"{which} is empty: a model needs at least one token to write on from")
            if len(prompt) + max_new_tokens > limit:
                raise ValueError(
                    f"{which} has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}, the model holds {limit} "
                    "in all: shorten the prompt, or ask for fewer"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                unknown = next(token for token in prompt if not 0 <= token < vocab_size)
                raise ValueError(f"{which} holds the id {unknown}, the vocabulary goes from 0 to {vocab_size - 1}")


def cache_dtype(weight: Tensor, decoder: Decoder | None) -> torch.dtype:
    """The weights' dtype; where the model's own forward makes all keys, autocast's too has to fit in."""
    if decoder is not None or weight.dtype == torch.float64 or not torch.is_autocast_enabled(weight.device.type):
        return weight.dtype
    return torch.promote_types(weight.dtype, torch.get_autocast_dtype(weight.device.type))


def _check_parts(model, tokenizer) -> None:
    compiled_from = getattr(model, "_orig_mod", model)  # what torch.compile returns has the model inside
    if model is None and tokenizer is not None:
        raise ValueError("tokenizer comes without a model: give both, or neither for the shipped checkpoint")
    if model is not None and not isinstance(compiled_from, MiniLLM):
        raise TypeError(
            f"model is a {type(model).__name__}, wants a MiniLLM: minillm.checkpoint has from_transformers and "
            "load_checkpoint, which make one"
        )
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, wants a tokenizers.Tokenizer: leave it out, and give ids to "
            "generate, such as tokenizer(text)['input_ids']"
        )


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=what_can_be_said(), formatter_class=raw
    )
    parser.add_argument("text", help='the user\'s text, in quotes: "My hobby is chess. What is my hobby?"')
    parser.add_argument("--checkpoint", default="small", help="a folder, or the name of a shipped checkpoint")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, and the default here")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--weights", choices=("same", "int8"), default="same")
    options = vars(parser.parse_args())
    text, checkpoint, weights = (options.pop(name) for name in ("text", "checkpoint", "weights"))
    try:
        generator = TextGenerator(*load_checkpoint(checkpoint), weights=weights)
        pieces = generator.stream_text(text, **options)
    except ValueError as error:
        parser.error(str(error))
    try:
        with profile() as report:
            for piece in pieces:
                print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:  # the reader closed the pipe, as `| head` does; Python would flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for name, measured in report.phases.items():
        print(f"{name}: {measured.tokens} tokens, {measured.tokens_per_second:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The tokenizer: byte-level BPE by Hugging Face's `tokenizers`, so that any text can be written."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minillm.corpus import SPECIAL_TOKENS

PAD_ID, USER_ID, BOT_ID, END_ID = range(4)  # the order of SPECIAL_TOKENS


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learns byte-level BPE merges from texts.

    Args:
        texts: the training text, in pieces.
        vocab_size: number of token ids, special tokens and the 256 bytes included.

    Returns:
        A `tokenizers.Tokenizer`; special tokens have the first ids, see `PAD_ID` and the others.

    Source:
        Sennrich, Haddow, Birch, arXiv 1508.07909; on bytes as in GPT-2.

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=270)
        >>> tokenizer.encode("to be").tokens
        ['Ġto', 'Ġbe']
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

"""How well the trained model answers: `make evaluate`, or `python -m minillm.evaluate runs/small`.

All facts are category–value pairs that training held out. An answer counts when every token of it, the end
included, is the model's first choice: then greedy decoding writes exactly this answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from minillm.checkpoint import load_checkpoint
from minillm.corpus import ABSTENTION, CATEGORIES, Fact, bot_turn, random_facts, small_talk, user_turn, values_of
from minillm.model import MiniLLM

FACTS = (1, 3, 5, 7)
GAPS = (20, 60, 120, 200)
Dialogue = tuple[str, str]  # what the person says, and the bot's answer


def evaluate(model: MiniLLM, tokenizer: Tokenizer, dialogues_per_cell: int = 100, seed: int = 1) -> dict:
    """Share of right answers by number of facts and distance: to what was said, said twice, and not said.

    Args:
        model, tokenizer: from `load_checkpoint`.
        dialogues_per_cell: dialogues for each number of facts and distance.
        seed: of the dialogues.

    Returns:
        {"recall", "latest" or "abstention": {"facts, gap": share}}, gap in tokens between fact and question (for
        abstention: between the first sentence and the question), and the mean of each under "mean".
    """
    results: dict = {}
    latest = partial(recall_dialogue, changed=True)
    kinds: dict[str, Callable[..., Dialogue]] = {
        "recall": recall_dialogue,
        "latest": latest,
        "abstention": abstention_dialogue,
    }
    progress = tqdm(total=len(kinds) * len(FACTS) * len(GAPS), desc="evaluate", unit="cell")
    for kind, make in kinds.items():
        results[kind] = {}
        for facts in FACTS:
            for gap in GAPS:
                rng = random.Random(f"{seed}/{kind}/{facts}/{gap}")
                dialogues = [make(rng, facts, gap, tokenizer) for _ in range(dialogues_per_cell)]
                results[kind][f"{facts}, {gap}"] = share_right(model, tokenizer, dialogues)
                progress.update()
        results[kind]["mean"] = sum(results[kind].values()) / len(results[kind])
    progress.close()
    return results


def recall_dialogue(
    rng: random.Random, num_facts: int, gap: int, tokenizer: Tokenizer, changed: bool = False
) -> Dialogue:
    """A question about a fact that was stated at least `gap` tokens before it, among others.

    Where it is changed, another value was stated before: the last statement counts.
    """
    asked, *others = random_facts(rng, num_facts, held_out=True)
    earlier = []
    if changed:
        value = rng.choice([value for value in values_of(asked.category, held_out=True) if value != asked.value])
        earlier = [Fact(asked.category, value).statement]
    cut = rng.randint(0, len(others))
    before = [fact.statement for fact in others[:cut]] + [small_talk(rng) for _ in range(2)] + earlier
    after = fill_up([fact.statement for fact in others[cut:]], gap, rng, tokenizer)
    rng.shuffle(before)
    sentences = [*before, asked.statement, *after, asked.category.question]
    return user_turn(sentences), bot_turn(asked.answer)


def abstention_dialogue(rng: random.Random, num_facts: int, gap: int, tokenizer: Tokenizer) -> Dialogue:
    """A question about something that was not said, after as much talk."""
    facts = random_facts(rng, num_facts, held_out=True)
    unsaid = rng.choice([category for category in CATEGORIES if category not in {fact.category for fact in facts}])
    sentences = fill_up([fact.statement for fact in facts], gap, rng, tokenizer)
    return user_turn([*sentences, unsaid.question]), bot_turn(ABSTENTION)


def fill_up(sentences: list[str], tokens: int, rng: random.Random, tokenizer: Tokenizer) -> list[str]:
    """The sentences, shuffled among small talk until they come to this many tokens."""
    sentences = list(sentences)
    length = sum(len(tokenizer.encode(sentence).ids) for sentence in sentences)
    while length < tokens:
        sentences.append(small_talk(rng))
        length += len(tokenizer.encode(sentences[-1]).ids)
    rng.shuffle(sentences)
    return sentences


@torch.no_grad()
def share_right(model: MiniLLM, tokenizer: Tokenizer, dialogues: list[Dialogue]) -> float:
    """Share of the dialogues whose whole answer the model gives."""
    return sum(is_right(model, tokenizer, *dialogue) for dialogue in dialogues) / len(dialogues)


def is_right(model: MiniLLM, tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Whether each token of the answer is the most likely one after the prompt and the answer before it."""
    ids = torch.tensor([tokenizer.encode(prompt + answer).ids])
    start = len(tokenizer.encode(prompt).ids)
    # The first token of the answer is the bot's mark: it is given, not guessed.
    guesses = model(ids, attention_backend="sdpa")[0, start:-1].argmax(-1)
    return bool((guesses == ids[0, start + 1 :]).all())


def table(results: dict, kind: str) -> Table:
    """One kind of result: a row a number of facts, a column a distance."""
    picture = Table(title=f"{kind}: {results[kind]['mean']:.1%} right")
    picture.add_column("facts \\ tokens", justify="right")
    for gap in GAPS:
        picture.add_column(str(gap), justify="right")
    for facts in FACTS:
        picture.add_row(str(facts), *(f"{results[kind][f'{facts}, {gap}']:.0%}" for gap in GAPS))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="small", help="a checkpoint, or the name of a shipped one")
    parser.add_argument("--dialogues", type=int, default=100, help="for each number of facts and distance")
    parser.add_argument("--write", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    model, tokenizer = load_checkpoint(options.folder)
    results = evaluate(model, tokenizer, options.dialogues)
    for kind in results:
        Console().print(table(results, kind))
    if options.write:
        cells = len(FACTS) * len(GAPS)
        figures = {"date": f"{date.today()}", "dialogues": options.dialogues * cells, **results}
        options.write.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

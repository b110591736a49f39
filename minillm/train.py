"""How the shipped checkpoint was made: `make train`, or `python -m minillm.train --out runs/small`.

Seeded and resumable: the batch of a step depends on the seed and the step alone, and the state on disk holds
the weights, the optimizer and the loss curve. Interrupt it and start it again, and it goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from minillm.checkpoint import load_weights, own_weights, save_checkpoint
from minillm.config import ModelConfig
from minillm.corpus import dialogue_with_changes, training_dialogue
from minillm.model import MiniLLM
from minillm.tokenizer import BOT_ID, END_ID, PAD_ID, train_tokenizer


@dataclass(frozen=True)
class Stage:
    """A step of the curriculum: from this share of the training on, dialogues of this size."""

    start: float
    max_facts: int
    max_sentences: int
    num_questions: int
    batch_size: int


# About 2,400 tokens a batch throughout. Two facts first: a model that starts with seven learns nothing for a long time.
CURRICULUM = (
    Stage(0.00, max_facts=2, max_sentences=4, num_questions=3, batch_size=32),
    Stage(0.12, max_facts=3, max_sentences=8, num_questions=4, batch_size=20),
    Stage(0.25, max_facts=5, max_sentences=16, num_questions=5, batch_size=12),
    Stage(0.40, max_facts=8, max_sentences=32, num_questions=6, batch_size=8),
)
SHORT = Stage(0.0, max_facts=2, max_sentences=2, num_questions=2, batch_size=48)  # what a person tries first
HARD_FROM = 7 / 8  # of the first training's steps: the last eighth asks hard questions, at half the learning rate
LEARNING_RATE = 2e-3
SECOND_LEARNING_RATE = 1e-3
ROUND = 4_000  # steps of the second training from one warm-up to the next
OTHER_TOKENS = 0.1  # weight in the loss of a token that is no answer: small talk cannot be predicted


def train(out: Path, steps: int, second_steps: int, seed: int = 0, save_every: int = 250) -> MiniLLM:
    """Trains `ModelConfig.small()` on generated dialogues and writes the checkpoint.

    First it learns to find what was said, then that what was said last holds: in the second training people change
    their minds, and name things with words that no list has.

    Args:
        out: folder for the checkpoint, the resumable state and the loss curve.
        steps, second_steps: optimizer steps of the two; an `out` that holds a state goes on from there.
        seed: of the weights, the tokenizer's text and the batches.
        save_every: steps between two states on disk.

    Returns:
        The trained model.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.small()
    tokenizer = corpus_tokenizer(config.vocab_size, seed)
    model = MiniLLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    first_step, curve = resume(out, model, optimizer)

    total = steps + second_steps
    progress = tqdm(range(first_step, total), initial=first_step, total=total, desc="train", unit="step")
    for step in progress:
        if step >= steps and (step - steps) % ROUND == 0:
            optimizer.state.clear()  # a round of the second training begins with no momentum
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, second_steps)
        rng = random.Random(f"{seed}/{step}")
        if step < steps:
            batch = training_batch(tokenizer, rng, step / (HARD_FROM * steps))
        else:
            batch = second_batch(tokenizer, rng, step - steps)
        loss, exact = training_step(model, optimizer, batch)
        curve.append((loss, exact))
        if (step + 1) % 25 == 0:
            recent = curve[-100:]
            loss, exact = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            progress.set_postfix(loss=f"{loss:.3f}", answers=f"{exact:.1%}")
        if (step + 1) % save_every == 0 or step + 1 == total:
            save_state(out, model, optimizer, step + 1, curve)
    save_checkpoint(out, model, tokenizer)
    plot_curve(out / "loss.png", curve)
    return model


@cache
def corpus_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """A tokenizer learned from 4,000 dialogues."""
    rng = random.Random(f"{seed}/tokenizer")
    return train_tokenizer((training_dialogue(rng, 7, 24, 5) for _ in range(4000)), vocab_size)


def learning_rate(step: int, steps: int, second_steps: int) -> float:
    """100 steps of warm-up, constant, linearly down; then from one half down again; then the rounds of the second."""
    main = HARD_FROM * steps
    if step >= steps:
        start = (step - steps) // ROUND * ROUND
        step, length = step - steps - start, min(ROUND, second_steps - start)
        return SECOND_LEARNING_RATE * min(1.0, (step + 1) / 50, 1.5 * (1 - step / length))
    if step >= main:
        return LEARNING_RATE * 0.5 * (1 - (step - main) / (steps - main))
    return LEARNING_RATE * min(1.0, (step + 1) / 100, 3 * (1 - step / main))


@dataclass(frozen=True)
class Batch:
    """inputs, targets: (batch, seqlen) ids, padded; is_answer, weight: the same shape, bool and fp32."""

    inputs: Tensor
    targets: Tensor
    is_answer: Tensor
    weight: Tensor


def training_batch(tokenizer: Tokenizer, rng: random.Random, progress: float) -> Batch:
    """Dialogues of one length, of the current stage; one batch in eight is of an earlier stage.

    Args:
        progress: share of the curriculum that lies behind; 1 and more asks hard questions.
    """
    reached = [stage for stage in CURRICULUM if stage.start <= progress]
    stage = rng.choice(reached) if rng.random() < 0.125 else reached[-1]
    return stage_batch(tokenizer, rng, stage, training_dialogue, hard=progress >= 1)


def second_batch(tokenizer: Tokenizer, rng: random.Random, step: int) -> Batch:
    """In two of three dialogues somebody changes their mind; every second batch asks hard questions.

    From the third round on some dialogues are as short as a fact or two and a question.
    """
    stages = CURRICULUM[1:] if step < 2 * ROUND else (SHORT, *CURRICULUM)
    stage, hard = (CURRICULUM[-1], True) if step % 2 else (rng.choice(stages), False)

    def dialogue(*size, **how) -> str:
        return (training_dialogue if rng.random() < 0.35 else dialogue_with_changes)(*size, **how)

    return stage_batch(tokenizer, rng, stage, dialogue, hard)


def stage_batch(
    tokenizer: Tokenizer, rng: random.Random, stage: Stage, dialogue: Callable[..., str], hard: bool
) -> Batch:
    """Dialogues of a stage's size, all with as many sentences; `dialogue` makes each of them."""
    num_sentences = rng.randint((stage.max_sentences + stage.max_facts) // 2, stage.max_sentences)
    texts = [
        dialogue(rng, stage.max_facts, num_sentences, stage.num_questions, hard=hard) for _ in range(stage.batch_size)
    ]
    ids = [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    return shifted(pad_sequence(ids, batch_first=True, padding_value=PAD_ID))


def shifted(ids: Tensor) -> Batch:
    """Inputs and next-token targets; a target is an answer where a bot's turn is open."""
    inputs, targets = ids[:, :-1], ids[:, 1:]
    is_answer = inputs.eq(BOT_ID).cumsum(1) > inputs.eq(END_ID).cumsum(1)
    weight = torch.where(is_answer, 1.0, OTHER_TOKENS) * (targets != PAD_ID)
    return Batch(inputs, targets, is_answer, weight)


def training_step(model: MiniLLM, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float]:
    """One update. Returns the mean loss of the answers' tokens and the share of answers that are right throughout."""
    logits = model(batch.inputs, attention_backend="sdpa")
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.weight)
    optimizer.zero_grad()
    (losses * batch.weight).sum().div(batch.weight.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses[batch.is_answer].mean().item(), exact_answers(logits, batch)


def exact_answers(logits: Tensor, batch: Batch) -> float:
    """The share of the answers of which every token has the largest logit; logits (batch, seqlen, vocab_size)."""
    wrong = (logits.argmax(-1) != batch.targets) & batch.is_answer
    first = batch.is_answer & ~F.pad(batch.is_answer, (1, 0))[:, :-1]  # each answer's first token
    row = torch.arange(len(first))[:, None] * first.shape[1]
    answer = (first.cumsum(1) + row)[batch.is_answer]  # which answer each of its tokens belongs to
    number_right = len(answer.unique()) - len(answer[wrong[batch.is_answer]].unique())
    return number_right / max(1, int(first.sum()))


def save_state(out: Path, model: MiniLLM, optimizer: torch.optim.Optimizer, step: int, curve: list) -> None:
    """Writes what `resume` reads. An earlier state is replaced only when the new one is whole."""
    tensors = {f"model.{name}": weight for name, weight in own_weights(model).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    save_file(tensors, out / "state.safetensors.new", metadata={"step": str(step), "curve": json.dumps(curve)})
    (out / "state.safetensors.new").replace(out / "state.safetensors")  # never half a state


def resume(out: Path, model: MiniLLM, optimizer: torch.optim.Optimizer) -> tuple[int, list]:
    """Loads a saved state into model and optimizer; returns the step and the curve, 0 and [] where nothing is saved."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0, []
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    load_weights(model, {name[6:]: weight for name, weight in tensors.items() if name.startswith("model.")})
    state: dict = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return int(metadata["step"]), json.loads(metadata["curve"])


def plot_curve(path: Path, curve: list) -> None:
    """Writes the loss and the share of right answers over the steps, averaged over 100, as a picture."""
    import matplotlib.pyplot as plt

    loss, exact = torch.tensor(curve).T.unfold(1, min(100, len(curve)), 1).mean(-1)
    figure, left = plt.subplots(figsize=(7, 3))
    left.plot(loss, color="#0072B2")
    left.set(xlabel="step", yscale="log")
    left.set_ylabel("loss of an answer's token", color="#0072B2")
    right = left.twinx()
    right.plot(exact, color="#D55E00")
    right.set(ylim=(0, 1))
    right.set_ylabel("answers right in training", color="#D55E00")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--second-steps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.time()
    train(options.out, options.steps, options.second_steps, options.seed)
    print(f"{options.out}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

"""Our attention inside every causal family that a tiny config can build, against the family's own eager attention.

`python -m tests.peers.sweep` walks all of them (half a minute), `python -m tests.peers.sweep llama doge` some.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor

from minillm.interfaces.transformers import register_with_transformers
from minillm.measure.budget import Budget, error_budget
from tests.peers.families import build, families, tiny_config

IDS = torch.randint(4, 97, (3, 20), generator=torch.Generator().manual_seed(0))
WHOLE = torch.ones_like(IDS)
LEFT = WHOLE.clone()
LEFT[0, :7] = LEFT[2, :13] = 0
RIGHT = LEFT.flip(1)


def logits(model: Any, mask: Tensor) -> Tensor:
    """Of one forward, (tokens, vocab_size): padding has none."""
    return model(IDS, attention_mask=mask).logits[mask.bool()]


def logits_of_steps(model: Any, mask: Tensor) -> Tensor:
    """Of three tokens that the model writes with its cache."""
    out = model.generate(
        IDS,
        attention_mask=mask,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits, 1)


CALLS: dict[str, Callable[[Any], Tensor]] = {
    "plain": lambda model: logits(model, WHOLE),
    "padding left": lambda model: logits(model, LEFT),
    "padding right": lambda model: logits(model, RIGHT),
    "steps": lambda model: logits_of_steps(model, LEFT),
}


@dataclass
class Outcome:
    """What became of a family: "right", "refused", "wrong" or "not built", and why."""

    family: str
    verdict: str
    why: str = ""
    calls: int = 0  # of our attention

    def __str__(self) -> str:
        return (
            f"{self.family}: {self.verdict}{f' ({self.why})' if self.why else ''}, {self.calls} calls of our attention"
        )


def try_family(family: str, name: str) -> Outcome:
    """Compares the attention registered as `name` with the family's eager one, in each of `CALLS`."""
    try:
        config = tiny_config(family)
        expected = _expected(config)
    except Exception as error:  # whatever a config that is too small, or a package that is missing, leads to
        return Outcome(family, "not built", f"{type(error).__name__}: {error}"[:150])
    with counted(name) as calls:
        try:
            ours = build(config, name)
        except KeyError:  # the family looks its layers up by this name: it can be set on a model that is there already
            ours = build(config, "eager")
            ours.set_attn_implementation(name)
        findings = {call: _judge(CALLS[call], ours, config, *values) for call, values in expected.items()}
    for verdict in ("wrong", "refused"):
        found = [f"{call}: {why}" for call, (kind, why) in findings.items() if kind == verdict]
        if found:
            return Outcome(family, verdict, found[0], len(calls))
    return Outcome(family, "right", "", len(calls))


@contextmanager
def counted(name: str) -> Iterator[list[str]]:
    """The calls of a registered attention are noted in the list."""
    attention, calls = transformers.AttentionInterface()[name], []

    def note(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return attention(*args, **kwargs)

    transformers.AttentionInterface.register(name, note)
    try:
        yield calls
    finally:
        transformers.AttentionInterface.register(name, attention)


@torch.no_grad()
def _expected(config: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """For each call that the family can do: its logits with eager attention, and with SDPA where it has that."""
    eager, expected = build(config, "eager"), {}
    try:
        other = build(config, "sdpa")
    except ValueError:
        other = eager
    for call, run in CALLS.items():
        try:
            expected[call] = run(eager), run(other)
        except Exception:
            if call == "plain":
                raise
    return expected


@torch.no_grad()
def _judge(run: Callable[[Any], Tensor], ours: Any, config: Any, eager: Tensor, other: Tensor) -> tuple[str, str]:
    try:
        budget = budget_of(run(ours), eager, other)
    except ValueError as error:
        instead = re.search(r"attn_implementation='(\w+)'", str(error))
        if not instead:
            return "wrong", f"the refusal names no other implementation: {error}"
        try:
            cure = budget_of(run(build(config, instead[1])), eager, other)
        except Exception as failure:
            return "wrong", f"{instead[1]} is named, and does not run: {failure}"
        return ("refused", str(error)) if cure else ("wrong", f"{instead[1]} is named, and wrong: {cure}")
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return ("right", "") if budget else ("wrong", str(budget))


def budget_of(ours: Tensor, eager: Tensor, other: Tensor) -> Budget:
    """What the family's own two implementations are apart, or what fp32 leaves of two layers of random weights.

    The family cannot run in float64: its mask of eager attention is NaN there, its experts know fp32 only.
    """
    budget = error_budget(ours, other, eager.double(), factor=3, multiple=64)
    too_wide = budget.limit > 1e-3 * eager.abs().max()
    return replace(budget, complaint="its own implementations are too far apart to tell") if too_wide else budget


def sweep(names: Iterable[str], name: str, show: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """The outcome of each family."""
    transformers.logging.set_verbosity_error()
    outcomes = []
    for family in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.append(try_family(family, name))
        show(outcomes[-1])
    return outcomes


def figures(outcomes: list[Outcome]) -> str:
    """Tried, right, refused, wrong, in a line."""
    count = Counter(outcome.verdict for outcome in outcomes)
    ours = sum(outcome.verdict == "right" and outcome.calls > 0 for outcome in outcomes)
    return (
        f"{len(outcomes) - count['not built']} families tried: {count['right']} right ({ours} through our attention, "
        f"{count['right'] - ours} have only their own), {count['refused']} refused, {count['wrong']} wrong; "
        f"{count['not built']} not built"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = sweep(
        sys.argv[1:] or families(), register_with_transformers(backend="tiled"), lambda o: print(o, flush=True)
    )
    print(figures(found))
    sys.exit(any(outcome.verdict == "wrong" for outcome in found))

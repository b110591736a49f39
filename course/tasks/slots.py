"""Rows in the slots of a cache: inputs with NaN in those that are unused, and what is wrong with what was stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from course.tasks.judge import as_tuple, call
from course.tasks.task import NotYet

READ_TOO_FAR = "a slot behind the row's length was read: what lies there means nothing"
ZERO_TIMES_NAN = (
    "the weights of unused slots are 0, but 0 · NaN is NaN: leave those slots out of the product with the values, "
    "or set their values to 0"
)


def filled_slots(rows: Tensor, capacity: int) -> Tensor:
    """Slots with these rows in front, and NaN behind them."""
    return torch.cat([rows, rows.new_full((capacity - len(rows), rows.shape[1]), torch.nan)])


def wrongly_stored(name: str, buffer: Tensor, old: Tensor, new: Tensor, length: int) -> str:
    """What is wrong with the rows that a buffer holds after new ones were written; "" where nothing is.

    Args:
        name: of the buffer.
        buffer: (slots, d) as the answer left it.
        old: (slots, d) before; rows from `length` on mean nothing.
        new: (new, d).
    """
    stop = length + len(new)
    if torch.equal(buffer[:stop], torch.cat([old[:length], new])):
        return ""
    if len(new) and torch.equal(buffer[: len(new)], new):
        return "the new rows overwrite the old ones: write them behind, from slot `length` on"
    if length and len(new) and torch.equal(buffer[length - 1 : stop - 1], new):
        return "the new rows begin one slot too early: the last old token is lost"
    for row in range(length):
        if not torch.equal(buffer[row], old[row]):
            changed = f"slot {row} of {name} does not hold what it held"
            if len(buffer) > len(old):
                return f"growing loses old rows, {changed}: copy all `length` of them"
            return f"{changed}: the old rows stay as they are"
    row = next(row for row in range(length, stop) if not torch.equal(buffer[row], new[row - length]))
    return f"slot {row} of {name} does not hold new token {row - length}: they go to the slots from `length` on, all"


def judge_beside_nan(
    function: Callable, inputs: tuple, got: tuple, finite: tuple, judge: Callable[[tuple, tuple, str], None], asks: str
) -> None:
    """Judges a result. Where it is NaN, the same inputs with numbers in the unused slots show why.

    Args:
        got: what the answer gave for `inputs`; its first part may be NaN.
        finite: the inputs with numbers in place of NaN.
        judge: called with inputs, the answer's result, and what to ask where the mistake has no name.
    """
    if got[0].isnan().any():
        again = as_tuple(call(function, *finite))
        if not again[0].isnan().any():  # so the NaN came from the slots
            judge(finite, again, READ_TOO_FAR)
            raise NotYet(ZERO_TIMES_NAN)
    judge(inputs, got, asks)

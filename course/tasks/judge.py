"""How an answer is judged: called, compared with float64, and its mistake named where it is a known one."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from course.tasks.task import NotBegun, NotYet
from minillm.measure import error_budget, format_bytes, measure_memory
from minillm.measure.memory import empty_recordings

NO_KEY = "or does this row see no key? −∞ − (−∞) and 0 / 0 are NaN too"
MOST_CALLS = 200_000  # of torch, where memory is measured: that takes some 10 s
CALLS_BETWEEN_CUTS = 10_000  # of torch, between two times that its recording is emptied: some 80 MiB


class Mistake(NamedTuple):
    """A mistake that people make.

    Args:
        message: what is wrong, and what would be right; or a function of the inputs that says it.
        answer: computes the result of an answer with that mistake.
    """

    message: str | Callable[..., str]
    answer: Callable[..., Any]


def compare(function: Callable, inputs: Sequence[Any], answer: Callable, **options: Any) -> None:
    """Calls the answer on inputs, and compares what it returns with the right one: see `compare_results`."""
    compare_results(call(function, *inputs), inputs, answer, **options)


def compare_results(
    got: Any,
    inputs: Sequence[Any],
    answer: Callable,
    *,
    results: Mapping[str, tuple[str, ...]],
    mistakes: Iterable[Mistake] = (),
    asks: str = "",
    nan: str = "which step made it?",
    no_key: str = NO_KEY,
    factor: float = 2,
    times: float = 1,
) -> None:
    """Compares results with the right ones, within the error budget.

    The allowance for rounding is 16 and not 4: right answers sum in different orders, and none may fail for that.

    Args:
        got: what the answer to judge returned.
        inputs: its arguments.
        answer: the right one, in any float dtype: float64 is the reference, the inputs' own dtype the naive method.
        results: for each result its name, and what its axes are called.
        mistakes: that are known, the likeliest first.
        asks: a question to ask where it is none of them.
        nan: the cause of NaN, or a question about it.
        no_key: another cause; "" where each row sees a key, or where `nan` names it.
        factor: of the error budget, 2 for results and 3 for gradients.
        times: how much larger than usual the scores are; exp amplifies their rounding by as much.

    Raises:
        NotYet: what is wrong.
    """
    got, naive = as_tuple(got), as_tuple(answer(*inputs))
    reference = as_tuple(answer(*map(_double, inputs)))
    check_form(got, naive, results)
    pairs = zip(got, naive, reference, strict=True)
    wrong = [i for i, pair in enumerate(pairs) if not error_budget(*pair, factor=factor, multiple=16 * times)]
    if not wrong:
        return
    for mistake in mistakes:
        if _was_made(mistake, inputs, got, naive, reference):
            message = mistake.message
            raise NotYet(message if isinstance(message, str) else message(*inputs))
    for (name, axes), mine in zip(results.items(), got, strict=True):
        if mine.isnan().any():
            question = "" if "−∞ − (−∞)" in nan else no_key
            raise NotYet(f"{name} is NaN at {_first(mine.isnan(), axes)}: {nan}\n{question}".rstrip())
    name, axes = list(results.items())[wrong[0]]
    where = _largest_error(got[wrong[0]], reference[wrong[0]], axes)
    raise NotYet("\n".join(filter(None, [f"{name} is {where}", asks])))


def call(function: Callable, *inputs: Any, through: Callable | None = None, most_calls: int | None = None) -> Any:
    """The answer's result on copies of the inputs.

    Args:
        through: calls the answer, `through(function, *inputs)`, where it is no function to be called directly.
        most_calls: of torch, that the answer may make; None: any number.

    Raises:
        NotBegun: it raised NotImplementedError.
        NotYet: it raised something else, it calls an attention of PyTorch or of this course, or torch too often.
    """
    copies = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    try:
        with _OwnWork(most_calls):
            return through(function, *copies) if through else function(*copies)
    except NotYet:
        raise
    except NotImplementedError as error:
        raise NotBegun(
            str(error) or "nothing is here yet: write it in place of `raise NotImplementedError()`"
        ) from None
    except Exception as error:
        raise NotYet(_where_raised(error, function)) from None


def check_form(got: tuple, expected: tuple[Tensor, ...], results: Mapping[str, tuple[str, ...]]) -> None:
    """Raises NotYet where the number of results, a type, a shape or a dtype is not as expected."""
    if len(got) != len(results):
        raise NotYet(f"{len(got)} results, expected {len(results)}: {', '.join(results)}")
    for (name, axes), mine, theirs in zip(results.items(), got, expected, strict=True):
        if not isinstance(mine, Tensor):
            raise NotYet(f"{name} is {_type(mine)}, expected a tensor")
        if mine.shape != theirs.shape:
            raise NotYet(f"{name} has shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}: ({', '.join(axes)})")
        if mine.dtype != theirs.dtype:
            raise NotYet(f"{name} is {mine.dtype}, expected {theirs.dtype}")


def extra_memory_below(limit: int, function: Callable, *inputs: Any, too_much: str) -> Any:
    """The answer's result, if the call takes less memory than that, its result included.

    Args:
        limit: bytes.
        too_much: why an answer takes more.

    Raises:
        NotYet: it takes more, or calls torch so often that measuring it would take minutes.
    """
    if hasattr(function, "peak_memory"):  # graded in a process of its own, and measured from outside
        result, peak = call(partial(function.peak_memory), *inputs)  # its errors name the function and the line
    else:
        used = call(lambda *copies: measure_memory(function, *copies), *inputs, most_calls=MOST_CALLS)
        result, peak = used.result, used.peak_bytes
    if peak > limit:
        raise NotYet(f"{too_much} ({format_bytes(peak)} at a time, allowed {format_bytes(limit)})")
    return result


def as_tuple(result: Any) -> tuple:
    """A function's result as a tuple, whether it returned one value or several."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


class _OwnWork(TorchFunctionMode):
    """Raises NotYet where an answer calls PyTorch's attention, or this course's, or torch too often."""

    def __init__(self, most_calls: int | None):
        super().__init__()
        self.calls, self.most_calls = 0, most_calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.most_calls and self.calls > self.most_calls:
            raise NotYet(f"work on whole blocks: it calls torch more than {self.most_calls:,} times here")
        if self.most_calls and self.calls % CALLS_BETWEEN_CUTS == 0:
            empty_recordings()
        name = getattr(func, "__name__", "")
        if "scaled_dot_product" in name or "flash_attention" in name:
            raise NotYet(f"it calls {name}: write it with matrix products and elementwise operations")
        if _caller().startswith("minillm.attention"):
            raise NotYet("it calls the library's attention: write your own, with torch alone")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The module of the code that called torch."""
    frame = sys._getframe(2)
    between = ("torch", "minillm.measure.memory")  # they hand the call on
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(between):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))


def _was_made(mistake: Mistake, inputs: Sequence, got: tuple, naive: tuple, reference: tuple) -> bool:
    """Whether the answer's results are the mistake's, where these differ from the right ones."""
    theirs, exact = as_tuple(mistake.answer(*inputs)), as_tuple(mistake.answer(*map(_double, inputs)))
    right = [error_budget(x, n, r) for x, n, r in zip(theirs, naive, reference, strict=True)]
    same = [_as_wrong(g, x, e) for g, x, e in zip(got, theirs, exact, strict=True)]
    return not all(right) and all(same)


def _as_wrong(got: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether a result is a mistake's; a row that sees no key may be NaN in one and 0 or infinite in the other."""
    empty = theirs.isnan() | theirs.isinf() | theirs.eq(0)
    lost = got.isnan() & empty | theirs.isnan() & (got.isnan() | got.isinf() | got.eq(0))
    if lost.all() and lost.numel():
        return False
    got, theirs, exact = (x.masked_fill(lost, 0) for x in (got, theirs, exact))
    return bool(error_budget(got, theirs, exact, factor=8, multiple=64))


def _largest_error(got: Tensor, reference: Tensor, axes: tuple[str, ...]) -> str:
    error = (got.double() - reference).nan_to_num(nan=0.0).abs()  # inf - inf is no error
    place = torch.unravel_index(error.argmax(), error.shape)
    mine, right = got[place].item(), reference[place].item()
    digits = 4 if f"{mine:.4g}" != f"{right:.4g}" else 9
    return f"{mine:.{digits}g} at {_name(place, axes)}, expected {right:.{digits}g}"


def _first(true: Tensor, axes: tuple[str, ...]) -> str:
    return _name(true.nonzero()[0], axes)


def _name(place: Iterable[Tensor], axes: tuple[str, ...]) -> str:
    return ", ".join(f"{axis} {int(i)}" for axis, i in zip(axes, place, strict=True))


def _where_raised(error: Exception, function: Callable) -> str:
    """Type, message and the learner's own line."""
    message = f"{type(error).__name__}: {error}"
    code = getattr(getattr(function, "fn", function), "__code__", None)  # a Triton function has a `fn`
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code and frame.filename == code.co_filename and frame.line:
            return f"{message}\nin the line: {frame.line}"
    return message if code else str(error)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _type(x: Any) -> str:
    return "nothing: is there a `return`?" if x is None else f"a {type(x).__name__}"

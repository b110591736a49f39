"""A student's function, called from the grader: the same values, the same traffic, and memory measured from outside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grading.remote import AnswerLost, AnswerRaised, NotAnswered, Patience, RemoteFunction, StudentProcess
from minillm.measure.traffic import Traffic
from tests.grading.notebooks import needs_bubblewrap

pytestmark = needs_bubblewrap

MIB = 1 << 20
SECONDS = 3  # that a call which hangs is waited for
PATIENCE = Patience(60)  # for all others: a busy machine takes longer
HANGS = 100

TILED = """
def double_tiles(x, y, rows):
    for i in range(0, x.shape[0], rows):
        tile = x.load(slice(i, i + rows))
        y.store(2 * tile, slice(i, i + rows), ...)
"""
CELLS = [
    "import torch, os, threading, time",
    TILED,
    "def add(x, y=0, *, times=1):\n    return (x + y) * times, [x.shape[0], True, None, 'text']",
    "def allocate(mib):\n    x = torch.ones(mib << 18)\n    return float(x[0])",
    "def beyond(x):\n    try:\n        x.load(1000)\n    except IndexError as error:\n        return str(error)",
    "def divide(x):\n    y = 0\n    return x / 0 if y else 1 / y",
    "def leave(x):\n    raise SystemExit(3)",
    f"def hang(x):\n    time.sleep({HANGS})",
    "def write(x):\n    open('file', 'w').write('x' * 10_000)",
    "def start(x):\n    threading.Thread(target=print).start()",
    "def changes(x):\n    x.zero_()\n    return x",
    "print('some words')\n1 / 0",
    "def thousands():\n    return torch.set_num_threads(8)",
]
NAMES = ["double_tiles", "add", "allocate", "beyond", "divide", "leave", "hang", "write", "start", "changes"]


@pytest.fixture(scope="module")
def student() -> Iterator[StudentProcess]:
    with StudentProcess(list(enumerate(CELLS)), [*NAMES, "absent", "thousands"], PATIENCE) as student:
        student.run()
        yield student
        assert not student._lost


def function(student: StudentProcess, name: str) -> RemoteFunction:
    return student.function(name, next(iter(student.candidates[name]), None))


def local(name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec("\n".join(CELLS[:5]), namespace)
    return namespace[name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_a_function_gives_there_what_it_gives_here(student, dtype):
    x, y = torch.arange(6).reshape(2, 3).to(dtype).T, torch.ones(2, dtype=dtype)
    (result, rest), (expected, expected_rest) = (f(x, y, times=3) for f in (function(student, "add"), local("add")))
    assert result.dtype == dtype and torch.equal(result, expected) and rest == expected_rest


def test_what_moves_there_is_what_moves_here(student):
    counted = []
    for double_tiles in (function(student, "double_tiles"), local("double_tiles")):
        traffic, y = Traffic(), torch.zeros(100, 3)
        double_tiles(traffic.tensor("x", torch.ones(100, 3)), traffic.tensor("y", y), 16)
        counted.append((traffic.read, traffic.written, traffic.peak_on_chip))
        assert torch.equal(y, torch.full((100, 3), 2.0))
    assert counted[0] == counted[1]


def test_a_tile_that_does_not_fit_is_refused_there_too(student):
    traffic = Traffic(sram=100)
    with pytest.raises(AnswerRaised, match="the tiles need more than sram 100 B"):
        function(student, "double_tiles")(traffic.tensor("x", torch.ones(100, 3)), torch.ones(1), 16)


def test_an_index_beyond_the_end_is_the_functions_own_to_catch(student):
    assert "out of bounds" in function(student, "beyond")(Traffic().tensor("x", torch.ones(3)))


@pytest.mark.parametrize("size", [8, 16, 128])
def test_peak_memory_is_what_was_allocated_to_within_4_mib(student, size):
    result, extra = function(student, "allocate").peak_memory(size)
    assert result == 1.0 and (size - 4) * MIB <= extra <= (size + 4) * MIB  # less, where the C library has room already


def test_arguments_are_no_memory_of_the_function(student):
    assert function(student, "changes").peak_memory(torch.ones(32 << 18))[1] < 36 * MIB


def test_an_argument_is_a_copy(student):
    x = torch.ones(3)
    assert torch.equal(function(student, "changes")(x), torch.zeros(3)) and torch.equal(x, torch.ones(3))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("divide", r"ZeroDivisionError: division by zero \(cell 6, line 3\)"),
        ("leave", r"SystemExit: 3 \(cell 7, line 2\)"),
        ("write", "File too large"),
        ("start", "can't start new thread"),
    ],
)
def test_what_a_function_raises_is_told_with_its_line(student, name, words):
    with pytest.raises(AnswerRaised, match=words):
        function(student, name)(torch.ones(2))


def test_what_a_cell_printed_and_raised_is_kept(student):
    (run,) = [run for run in student.cell_runs if run.output]
    assert (run.output, run.error) == ("some words\n", "ZeroDivisionError: division by zero (cell 12, line 2)")


def test_more_threads_are_no_mistake(student):
    assert function(student, "thousands")() is None


def test_a_function_that_is_not_there_is_named(student):
    with pytest.raises(NotAnswered, match="no cell defines a function `absent`"):
        function(student, "absent")()


def test_an_answer_that_hangs_costs_its_own_time_and_no_other_answer(student, monkeypatch):
    hang, add = function(student, "hang"), function(student, "add")
    start = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(AnswerLost, match=f"`hang` did not end within {SECONDS} s"):
        patch.setattr(student, "patience", Patience(SECONDS))
        hang(1)
    assert SECONDS <= time.monotonic() - start < HANGS / 2  # the process is ended too, on a busy machine in seconds
    with pytest.raises(AnswerLost):
        add(torch.ones(1))  # the same test does not wait again
    student.revive()
    assert add(torch.ones(1))[0] == 1

"""Calls functions in a student's process: sends the arguments, and decodes the bytes that come back."""

from __future__ import annotations

import re
import time
import unicodedata
from dataclasses import dataclass, field
from typing import Any, NoReturn

from grading.bubblewrap import Limits, SandboxError
from grading.hbm import TileServer, handle
from grading.protocol import Channel, ProtocolError, decode, encode
from grading.sandbox import Sandbox
from minillm.measure import Counted

START_SECONDS = 120  # to import torch, on a busy machine
OWN_MEMORY = 48 << 20  # what a notebook's imports may take before it counts: matplotlib takes 34


class AnswerError(Exception):
    """The student's function gave no result; the message says why, for the student."""


class NotAnswered(AnswerError):
    """There is no function of that name in the notebook."""


class AnswerRaised(AnswerError):
    """The function raised an exception, or returned something that cannot be judged."""


class AnswerLost(AnswerError):
    """The student's process has ended: the function took too long, exited, or sent an invalid message."""


@dataclass(frozen=True)
class Patience:
    """Seconds that the grader waits for a call of a student's function, and the limits that follow from it."""

    call: float = 20

    @property
    def cells(self) -> float:
        """For all cells of a notebook."""
        return 3 * self.call

    @property
    def unit(self) -> float:
        """For everything but the start of the sandbox."""
        return 9 * self.call


@dataclass
class CellRun:
    """A cell that was run: its error (None where it raised none), and what it printed."""

    number: int
    error: str | None
    output: str


@dataclass
class StudentProcess:
    """A student's notebook, running in a sandbox; started when it is first needed, and again when it was lost.

    Args:
        cells: the sources to run, by number: the release's setup first, then the student's.
        wanted: the functions that will be called.
        unsafe: no sandbox.
    """

    cells: list[tuple[int, str]]
    wanted: list[str]
    patience: Patience = field(default_factory=Patience)
    unsafe: bool = False

    def __post_init__(self) -> None:
        self.cell_runs: list[CellRun] = []
        self.candidates: dict[str, list[int]] = {name: [] for name in self.wanted}
        self._deadline = time.monotonic() + self.patience.unit
        self._sandbox: Sandbox | None = None
        self._lost: str | None = None
        self._never = False  # the cells themselves cannot be run to their end

    def __enter__(self) -> StudentProcess:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, and all that it has started."""
        if self._sandbox:
            self._sandbox.close()
        self._sandbox = None

    def revive(self) -> None:
        """Forgets a loss, so that the next call starts anew: one answer that hangs does not cost the others."""
        if self._lost and not self._never:
            self._lost = None

    def run(self) -> None:
        """Starts the process and runs the cells, unless that is done.

        Raises:
            AnswerLost: the cells do not come to their end.
            SandboxError: there is no sandbox here.
        """
        if self._lost:
            raise AnswerLost(self._lost)
        if self._sandbox:
            return
        start = time.monotonic()
        self._sandbox = Sandbox(Limits(cpu_seconds=int(2 * self.patience.unit) + 1), self.unsafe)
        self._channel = Channel(self._sandbox.connection)
        try:
            self._channel.receive(START_SECONDS)
        except (OSError, ProtocolError) as error:
            output = self._sandbox.first_output.decode(errors="replace").strip()
            self.close()
            raise SandboxError(f"the sandbox did not start: {output or error}") from None
        self._sandbox.trust_now()
        self._deadline += time.monotonic() - start  # none of it is the student's time
        self._at_start = self._sandbox.memory()[0]
        message = {"cells": [{"number": n, "source": s} for n, s in self.cells], "wanted": self.wanted}
        try:
            reply, _ = self._exchange(message, [], self.patience.cells, "the notebook's cells")
            self._read_runs(reply)
        except AnswerLost:
            self._never = True
            raise
        self._sandbox.freeze()

    def why_not(self, name: str) -> str:
        """Why there is no such function."""
        for number, source in self.cells:
            error = next((run.error for run in self.cell_runs if run.number == number), None)
            if error and re.search(rf"\b{name}\b", source):
                return f"`{name}` is not there, for its cell raised {error}"
        return f"not answered: no cell defines a function `{name}`"

    def function(self, name: str, candidate: int | None = None) -> RemoteFunction:
        """The function of that name; candidate is the number of the cell that defines it, None for none."""
        return RemoteFunction(self, name, candidate)

    def call(
        self, name: str, candidate: int, arguments: tuple, named: dict, memory: bool = False, program: str | None = None
    ) -> tuple[Any, int]:
        """Calls a function over there.

        Args:
            memory: whether to measure.
            program: the name of a program in `triton_programs` that calls it.

        Returns:
            What it returned, and with memory=True the bytes that the process took beyond those it had.
        """
        self.run()
        assert self._sandbox is not None
        counted: list[Counted] = []
        tree, blobs = encode([arguments, list(named.items())], lambda value: handle(value, counted))
        before = self._sandbox.memory()[0]
        if memory:
            self._sandbox.reset_peak()
        message = {"call": name, "candidate": candidate, "arguments": tree, "program": program}
        reply, blob = self._exchange(message, blobs, self.patience.call, f"`{name}`", counted)
        sent = sum(blob.nbytes for blob in blobs)
        peak = self._sandbox.memory()[1] if memory else 0
        if "raised" in reply:
            raise AnswerRaised(_as_text(reply["raised"]))
        if "refused" in reply:
            raise AnswerRaised(f"`{name}` returned {plain(reply['refused'], 100)}: tensors and numbers can be graded")
        try:
            result = decode(reply.get("returned"), blob)
        except ProtocolError as error:
            raise AnswerRaised(f"`{name}` sent something that is no result ({plain(str(error), 200)})") from None
        return result, max(0, peak - min(before, self._at_start + OWN_MEMORY) - sent)

    def _exchange(
        self, message: dict, blobs: list[memoryview], seconds: float, what: str, counted: list[Counted] | None = None
    ) -> tuple[dict, bytearray]:
        """Sends a request and serves loads and stores until the reply is there."""
        left = self._deadline - time.monotonic()
        deadline = time.monotonic() + min(seconds, left)
        try:
            self._channel.send(message, blobs, deadline - time.monotonic())
            server = TileServer(counted or [])
            while True:
                reply, blob = self._channel.receive(deadline - time.monotonic())
                server.free(reply.get("freed"))
                if not ("load" in reply or "store" in reply):
                    return reply, blob
                self._channel.send(*server.serve(reply, blob), deadline - time.monotonic())
        except TimeoutError:
            if left < seconds:
                self._never = True
                self._lose(f"the notebook took more than {self.patience.unit:.0f} s in all, and was stopped in {what}")
            self._lose(f"{what} did not end within {seconds:.0f} s")
        except ProtocolError as error:
            self._lose(f"{what} sent the grader something that is no message ({plain(str(error), 200)})")
        except OSError:
            self._lose(f"{what} ended the process")

    def _lose(self, reason: str) -> NoReturn:
        if self._sandbox and self._sandbox.ended:
            reason += f": {self._sandbox.ended}"
        self._lost = reason
        self.close()
        raise AnswerLost(reason)

    def _read_runs(self, reply: dict) -> None:
        """Keeps the entries of the right form. They come from the student's process, and no point depends on them."""
        numbers = {number for number, _ in self.cells}
        runs, candidates = reply.get("runs"), reply.get("candidates")
        if not isinstance(runs, list) or not isinstance(candidates, dict):
            self._lose("the notebook's cells sent the grader something that is no message")
        self.cell_runs = [
            CellRun(item["number"], _as_text(item["error"]) if item.get("error") else None, plain(item.get("output")))
            for item in runs[: len(self.cells)]
            if isinstance(item, dict) and type(item.get("number")) is int and item["number"] in numbers
        ]
        for name in self.wanted:
            found = candidates.get(name)
            found = found[-3:] if isinstance(found, list) else []
            self.candidates[name] = [number for number in found if type(number) is int and number in numbers]


class RemoteFunction:
    """A student's function as a test sees it: called like any function, and it only ever gives values.

    Arguments may be tensors, numbers, strings, None, tuples and lists of those, and `Counted` tensors, which stay
    here: the student's side asks for their tiles. A tensor goes over as a copy: what is written into it over there
    is not seen here.

    Raises:
        AnswerError: the student's function gave no result.
    """

    def __init__(self, student: StudentProcess, name: str, candidate: int | None):
        self.__name__ = self.__qualname__ = name
        self._student, self._candidate = student, candidate

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call(arguments, named)[0]

    def peak_memory(self, *arguments: Any, **named: Any) -> tuple[Any, int]:
        """The result, and how many bytes the whole process took at most beyond the arguments, the result included.

        It is measured from outside, in pages, and what the C library and torch take for themselves is in it: allow
        for 4 MiB. A buffer that the notebook made before the call counts too, from `OWN_MEMORY` on.
        """
        return self._call(arguments, named, memory=True)

    def launch(self, program: str, *arguments: Any) -> list:
        """What `triton_programs.launch` returns over there, with the function as its loop.

        Unlike results and traffic, its two counts are made in the student's process: they are of the right form, and
        no more is known of them.
        """
        found = self._call(arguments, {}, program=program)[0]
        if not isinstance(found, list) or len(found) < 3 or not all(type(count) is int for count in found[-2:]):
            raise AnswerRaised(f"`{self.__name__}` sent something that is no result of a program")
        return found

    def _call(self, arguments: tuple, named: dict, memory: bool = False, program: str | None = None) -> tuple[Any, int]:
        if self._candidate is None:
            raise NotAnswered(self._student.why_not(self.__name__))
        return self._student.call(self.__name__, self._candidate, arguments, named, memory, program)


def _as_text(error: Any) -> str:
    """A student's exception as text, from the fields that `worker.described` sends."""
    error = error if isinstance(error, dict) else {}
    text = f"{plain(error.get('type'), 80) or 'error'}: {plain(error.get('message'), 500)}".removesuffix(": ")
    line, cell = error.get("line"), error.get("cell")
    return text + (f" (cell {cell + 1}, line {line})" if type(line) is int and type(cell) is int else "")


def plain(text: Any, limit: int = 10_000) -> str:
    """Text from a student, safe to print: no escape codes, no control characters, cut to length."""
    if not isinstance(text, str):
        return ""
    text = text[: limit + 1].replace("\r\n", "\n")
    kept = "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "�" for c in text)
    return kept if len(kept) <= limit else kept[:limit] + " […]"

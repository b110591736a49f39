"""The student's side: runs the cells of a notebook, then calls the functions that they define.

It runs in the sandbox, in one process with the student's code, which can replace every line of it. So nothing here
decides on points.
"""

from __future__ import annotations

import functools
import importlib
import io
import os
import socket
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from IPython.core.compilerop import CachingCompiler
from IPython.core.history import HistoryManager
from IPython.core.interactiveshell import InteractiveShell
from protocol import Channel, NotAValue, decode, encode

PROGRAMS = "triton_programs.py"
OUTPUT = 10_000  # characters of a cell's output that are kept
CANDIDATES = 3  # definitions of a function that are tried, the last ones
MESSAGE = 500  # characters of an exception's text


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    warm_up()
    notebook = Notebook()
    course_is_a_stub()
    fused_attention_is_off()
    channel.send({"ready": True})
    remote = Remote(channel)
    while True:
        request, blob = channel.receive()
        if "cells" in request:
            channel.send(notebook.run(request["cells"], request["wanted"]))
        else:
            remote.answer(notebook.candidates, request, blob)


def warm_up() -> None:
    """Makes torch allocate what its first product and its first exponential need, so that it does not count."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = torch.ones(2, 64, 64, dtype=dtype)
        torch.softmax(x @ x, -1).exp().logsumexp(-1).amax()
        torch.einsum("bij,bkj->bik", x, x)


class Notebook:
    """A notebook's cells, run one after another as Jupyter would, and what they define.

    Attributes:
        candidates: by name, the functions that the cells bound to it, in order, with their cell's number.
    """

    def __init__(self) -> None:
        self.shell = Shell.instance()
        self.shell.compile = Compiler()
        self.cell = 0
        self.candidates: dict[str, list[tuple[int, Callable]]] = {}

    def run(self, cells: list[dict], wanted: list[str]) -> dict:
        """Runs the cells; those which raised are tried once more, for the cells may have been put in another order.

        Args:
            cells: each {"number": int, "source": str}.
            wanted: the names of the functions that will be called.

        Returns:
            {"runs": [{"number", "error", "output"}], "candidates": {name: [number of the cell]}}
        """
        runs = {cell["number"]: self._run_one(cell, wanted) for cell in cells}
        for cell in cells:
            if runs[cell["number"]]["error"]:
                runs[cell["number"]] = self._run_one(cell, wanted)
        for name in wanted:
            last = dict(self.candidates.get(name, []))  # of a cell that was run twice, the second time
            self.candidates[name] = list(last.items())[-CANDIDATES:]
        names = {name: [number for number, _ in self.candidates[name]] for name in wanted}
        return {"runs": list(runs.values()), "candidates": names}

    def _run_one(self, cell: dict, wanted: list[str]) -> dict:
        self.cell = Compiler.cell = cell["number"]
        namespace = self.shell.user_ns
        before = {name: namespace.get(name) for name in wanted}
        printed = Printed()
        error = None
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                result = self.shell.run_cell(cell["source"], store_history=False)
            if result.error_before_exec or result.error_in_exec:
                error = described(result.error_before_exec or result.error_in_exec)
        except BaseException as caught:
            error = described(caught)
        for name in wanted:
            function = namespace.get(name)
            if callable(function) and function is not before[name]:
                self.candidates.setdefault(name, []).append((self.cell, function))
        return {"number": self.cell, "error": error, "output": printed.getvalue()}


class Compiler(CachingCompiler):
    """Names a cell's code after its number, so that a traceback says which cell it was."""

    cell = 0

    def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
        return f"<cell {self.cell}>"


class Shell(InteractiveShell):
    """IPython as in a notebook, magics included, without a screen."""

    def init_history(self) -> None:
        self.history_manager = HistoryManager(shell=self, parent=self, enabled=False)

    def enable_gui(self, gui: Any = None) -> None:  # %matplotlib inline
        pass

    def showtraceback(self, *_: Any, **__: Any) -> None:  # see `described`
        pass

    showsyntaxerror = showindentationerror = showtraceback


class Printed(io.StringIO):
    """Keeps the beginning of what is written."""

    def write(self, text: str) -> int:
        if self.tell() < OUTPUT:
            super().write(text[: OUTPUT - self.tell()])
        return len(text)


def described(error: BaseException) -> dict:
    """An exception as it is sent: its type, its message, and its place in the notebook."""
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename[:5] == "<cell"), None)
    line, cell = (place.lineno, place.filename) if place else (None, None)
    if isinstance(error, SyntaxError):
        line, cell = error.lineno, f"<cell {(error.filename or '')[6:-1]}>"
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:
        message = ""
    number = cell[6:-1] if cell else ""
    return {
        "type": type(error).__name__[:80],
        "message": str(message)[:MESSAGE],
        "line": line if isinstance(line, int) else None,
        "cell": int(number) if number.isdigit() else None,  # the release's own have negative numbers
    }


class Remote:
    """Calls a function with arguments that the grader sent, and sends back what it returned."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.lock = threading.RLock()
        self.freed: list[int] = []

    def answer(self, candidates: dict[str, list[tuple[int, Callable]]], request: dict, blob: bytearray) -> None:
        """Calls what the grader asked for, and sends back what came of it."""
        try:
            arguments, named = decode(request["arguments"], blob, self._handle)
            function = dict(candidates[request["call"]])[request["candidate"]]
            if request["program"]:
                programs = importlib.import_module("course.tasks.triton_programs")
                function = functools.partial(programs.launch, request["program"], function)
            with redirect_stdout(Printed()), redirect_stderr(Printed()):
                result = function(*arguments, **dict(named))
            tree, blobs = encode(result)
        except NotAValue as error:
            self.send({"refused": str(error)})
        except BaseException as error:
            self.send({"raised": described(error)})
        else:
            self.send({"returned": tree}, blobs)

    def free(self, tile: int) -> None:
        """Notes a tile that the function no longer holds; the next message tells the grader."""
        self.freed.append(tile)

    def send(self, message: dict, blobs: list[memoryview] | None = None) -> None:
        """Sends a message to the grader, with the tiles freed since the last one, and bytes behind it."""
        freed, self.freed = self.freed, []
        self.channel.send(message | {"freed": freed}, blobs)

    def _handle(self, content: list) -> CountedHandle:
        number, dtype, shape = content
        return CountedHandle(self, number, getattr(torch, dtype), torch.Size(shape))

    def ask(self, message: dict, blobs: list[memoryview]) -> Any:
        """Sends a message to the grader and waits for its answer."""
        with self.lock:
            self.send(message, blobs)
            reply, blob = self.channel.receive()
        if "raised" in reply:
            error = {"ValueError": ValueError, "IndexError": IndexError}.get(reply["raised"][0], RuntimeError)
            raise error(reply["raised"][1])
        return reply.get("tile"), decode(reply["value"], blob)


class CountedHandle:
    """A tensor in HBM, which is in the grader's process: `load` and `store` ask for it, and are counted there."""

    def __init__(self, remote: Remote, number: int, dtype: torch.dtype, shape: torch.Size):
        self._remote, self._number, self.dtype, self.shape = remote, number, dtype, shape

    def load(self, *index: Any) -> torch.Tensor:
        """Reads a tile, `tensor[index]`. It is on the chip for as long as you keep it."""
        tile, value = self._remote.ask({"load": self._number, "index": encode(index)[0]}, [])
        if tile is not None:
            weakref.finalize(value, self._remote.free, tile)
        return value

    def store(self, tile: Any, *index: Any) -> None:
        """Writes a tile, `tensor[index] = tile`, in the tensor's dtype."""
        tree, blobs = encode(tile)
        self._remote.ask({"store": self._number, "index": encode(index)[0], "tile": tree}, blobs)


def course_is_a_stub() -> None:
    """Makes `course` importable as a stub, whose checks do nothing, and refuses the library."""
    sys.meta_path.insert(0, NotHere())


class NotHere(MetaPathFinder, Loader):
    """`import course` finds modules whose every name does nothing; `minillm` and `kernels` are refused.

    `course.tasks.triton_programs` is the course's own file. It uses `kernels.runtime` to have kernels interpreted; a
    stub will do here, because the environment variable is set before Triton is imported.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "course.tasks.triton_programs":
            here = Path(__file__).parent  # of this file; in the sandbox, of the other one too
            places = (here / PROGRAMS, here.parent / "course" / "tasks" / PROGRAMS)
            return spec_from_file_location(name, next(place for place in places if place.exists()))
        package = name.partition(".")[0]
        if package == "minillm" or (package == "kernels" and name not in ("kernels", "kernels.runtime")):
            raise ImportError(f"{package} is not available where answers are graded: use torch alone")
        return ModuleSpec(name, self, is_package=True) if package in ("course", "kernels") else None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["__getattr__"] = _nothing_of


class Nothing:
    """Takes any call and any attribute, and does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def _nothing_of(name: str) -> Nothing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Nothing()


def fused_attention_is_off() -> None:
    """Makes torch's own attention raise. (Against a habit, not against intent: see the threat model.)"""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch's own attention is no answer here: write it with matrix products and softmax")

    functional, operators = torch.nn.functional, torch.ops.aten
    for name in ("scaled_dot_product_attention", "multi_head_attention_forward"):
        setattr(functional, name, refuse)
    for name in dir(operators):
        if "scaled_dot_product" in name:
            setattr(operators, name, refuse)
    torch.nn.MultiheadAttention.forward = refuse  # type: ignore


if __name__ == "__main__":
    # More threads could not be started, and torch would end the process.
    torch.set_num_threads(1)
    torch.set_num_threads = lambda count: None  # type: ignore
    try:
        main()
    except (ConnectionError, KeyboardInterrupt):
        os._exit(0)

"""Source code in a lesson's output: in a monospaced font wherever it is read, and closed until clicked on request."""

from __future__ import annotations

import html
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from pygments.style import Style
from pygments.token import Comment, Keyword, String

FRAME = "margin:0;padding:8px 12px;overflow-x:auto;background:#F7F7F7;color:#1A1A1A;font-size:13px;line-height:1.4;"
MONOSPACED = "font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;"


class _FewColours(Style):
    """Three colours, each at 4.5:1 or more on the frame: a page with many sources stays small."""

    styles = {Comment: "#5F5F5F", Keyword: "#7A2E8E", String: "#00663F"}


class Source:
    """A piece of code with a title, as text and as HTML.

    Args:
        code: Python.
        title: one line of plain text over it; the line to click where it is folded.
        folded: closed until it is clicked, or opened with Enter.
    """

    def __init__(self, code: str, title: str, folded: bool = False):
        self.code, self.title, self.folded = textwrap.dedent(code).strip("\n"), title, folded

    def __repr__(self) -> str:
        return f"{self.title}\n\n{self.code}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": self.as_html()}

    def as_html(self) -> str:
        """The code with its frame, styles inside: exported pages and GitHub have no style sheet for it."""
        formatter = HtmlFormatter(style=_FewColours, noclasses=True, nowrap=True)
        code = highlight(self.code, PythonLexer(), formatter).rstrip("\n")
        frame = f'<pre style="{FRAME}{MONOSPACED}">{code}</pre>'
        title = html.escape(self.title)
        if not self.folded:
            return f"<p>{title}</p>{frame}"
        return f'<details><summary style="cursor:pointer">{title}</summary>{frame}</details>'


def show_source(function: Callable, folded: bool = False) -> Source:
    """A function's or a class's source as the package has it.

    Args:
        function: also a Triton kernel's `.fn`.
        folded: closed until clicked: for what the reader was asked to write first, and for helpers.
    """
    module = getattr(inspect.getmodule(function), "__name__", "")
    where = f" in {module.replace('.', '/')}.py" if module and module != "__main__" else ""
    return Source(inspect.getsource(function), f"The source of {function.__name__}{where}", folded)

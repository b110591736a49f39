"""Notebooks as students hand them in, made from the unit of lesson 01."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from grading.unit import Unit, find_units

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="not verified: the sandbox, for bubblewrap is not installed"
)

FUNCTION = "gqa_attention"
POINTS = 6  # of its tests; its question in text has more

RIGHT = """def gqa_attention(q, k, v):
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:]).triu(1 + k.shape[1] - q.shape[1]).bool()
    scores = scores.masked_fill(later, -torch.inf)
    p = scores.softmax(-1).masked_fill(later, 0)
    return torch.einsum("bhij,bjhd->bihd", p, v), scores.logsumexp(-1)
"""
WRONG = "def gqa_attention(q, k, v):\n    return q, q[..., 0].transpose(1, 2)\n"


@cache
def unit(name: str = "01") -> Unit:
    """The unit whose name begins with `name`."""
    (found,) = find_units(only=name)
    return found


def released(name: str = "01") -> dict[str, Any]:
    """A unit's notebook as it is handed out, as JSON."""
    return json.loads(json.dumps(unit(name).release))


def handed_in(
    answer: str, before: Iterable[str] = (), after: Iterable[str] = (), name: str = "01", function: str = FUNCTION
) -> dict[str, Any]:
    """The notebook with an answer in the function's cell, and more code cells before and after it."""
    notebook = released(name)
    place = next(i for i, cell in enumerate(notebook["cells"]) if grade_id(cell) == function)
    notebook["cells"][place]["source"] = answer
    notebook["cells"][place + 1 : place + 1] = map(code, after)
    notebook["cells"][place:place] = map(code, before)
    return notebook


def code(source: str) -> dict[str, Any]:
    """A code cell without metadata, as one that was added."""
    return {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": source}


def grade_id(cell: dict[str, Any]) -> str:
    return cell["metadata"].get("nbgrader", {}).get("grade_id", "")


def save(notebook: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook), encoding="utf-8")
    return path

"""The scripts in examples/ run as a reader runs them, and print what they are about."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.grading.notebooks import needs_bubblewrap

ROOT = Path(__file__).resolve().parent.parent

PRINTS = {
    "attention_call": r"out \(1, 5, 8, 64\) by sdpa.*lse \(1, 8, 5\) by tiled.*keys 7 to 11: \de-0[6789] away",
    "attention_in_transformers": r"attention by minillm.*largest difference \de-0[6789]",
    "compile_kernel": r"forward d=128.*'wgmma': \d+.*, 0 bytes.*backward_kv d=128.*wgmma\.mma_async",
    "emulate_kernel": r"out == 2 x is True.*missing fence: on tile.*fence_async_shared\(\) between the two",
    "generate_text": r"Your favourite dish is ramen\..*prefill .*decode ",
    "grade_folder": r"ann: 6 points.*ben: 0 points.*feedback/ann/01_naive_attention\.html",
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_bubblewrap if name == "grade_folder" else ()) for name in PRINTS]
)
def test_an_example_prints_what_it_is_about(name):
    command = [sys.executable, f"examples/{name}.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.search(PRINTS[name], run.stdout, re.DOTALL), run.stdout


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == PRINTS.keys()


@pytest.mark.parametrize("name", PRINTS)
def test_every_example_stands_in_the_readme(name):
    assert f"(examples/{name}.py)" in (ROOT / "README.md").read_text()

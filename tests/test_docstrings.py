"""The examples in docstrings are run, wherever there are any, and the calls that a reader begins with have one."""

import ast
import doctest
import importlib
from collections.abc import Iterator

import pytest
import torch

from tools.imports import read_modules

PACKAGES = ("minillm", "kernels", "course", "grading", "tools", "benchmarks")
MODULES = {name: module for name, module in read_modules().items() if name.split(".")[0] in PACKAGES}

BEGIN_WITH = {
    "minillm.attention.backends": ["attend", "attention", "attention_varlen", "choose_backend"],
    "minillm.attention.online": ["merge_state"],
    "minillm.cache.contiguous": ["KVCache"],
    "minillm.checkpoint": ["load_checkpoint"],
    "minillm.config": ["ModelConfig"],
    "minillm.generate": ["TextGenerator"],
    "minillm.interfaces.flash_attn": ["flash_attn_func", "flash_attn_varlen_func"],
    "minillm.measure.budget": ["error_budget"],
    "minillm.measure.memory": ["measure_memory", "record_peak", "format_bytes"],
    "minillm.measure.profiler": ["profile"],
    "minillm.measure.roofline": ["ridge", "attainable", "time_bound", "attention_flops"],
    "minillm.measure.traffic": ["count_traffic", "count_operators"],
    "minillm.model": ["MiniLLM"],
    "minillm.rope": ["apply_rope", "shift_rope"],
    "minillm.sampling": ["sample", "next_token_probabilities"],
    "minillm.tokenizer": ["train_tokenizer"],
    "kernels.emulator.launch": ["emulate"],
    "kernels.compiling.compile": ["compile_kernels"],
}


def with_examples() -> Iterator[str]:
    """The modules in whose text a doctest stands; the others are not imported."""
    for name, module in MODULES.items():
        docstrings = [ast.get_docstring(node) for node in ast.walk(module.tree) if isinstance(node, DOCUMENTED)]
        if any(">>> " in (docstring or "") for docstring in docstrings):
            yield name


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("name", with_examples())
def test_what_docstrings_show_is_what_comes_out(name):
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for example in doctest.DocTestFinder().find(module, name, globs=vars(module) | {"torch": torch}):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).attempted > 0
    assert not report, "".join(report)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, calls in BEGIN_WITH.items() for call in calls])
def test_a_call_that_a_reader_begins_with_has_an_example(name, call):
    assert call in {place for place, docstring in docstrings(name) if ">>> " in docstring}


def test_a_wrong_example_is_reported():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(wrong, out=lambda text: None).failed == 1


def docstrings(name: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module's functions and classes; a class has its methods' too."""
    for node in MODULES[name].tree.body if name in MODULES else ():
        if isinstance(node, DOCUMENTED):
            inner = [child for child in ast.walk(node) if isinstance(child, DOCUMENTED)]
            yield node.name, "\n".join(ast.get_docstring(child) or "" for child in inner)

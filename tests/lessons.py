"""Which lesson a test belongs to: `pytest -m lesson03` runs what belongs to lesson 03.

A test whose id names a unit ("03_tiling") or a task of it belongs to that lesson alone. So does a cell of a notebook,
in `pytest -m lesson03 --nbval tests notebooks solutions`.
All others belong where FILES puts their file or folder; the longest path that fits decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ALL = ("all_lessons",)  # what no lesson can do without
LATER = ("later_lessons",)  # has no lesson yet

FILES = {
    "attention": ("lesson01", "lesson02", "lesson03"),
    "attention/test_masks.py": ("lesson01",),
    "attention/test_merge.py": ("lesson02",),
    "benchmarks": ("lesson05",),
    "browser": ALL,
    "cache": ("lesson04",),
    "emulator": LATER,
    "exercises": ALL,
    "grading": ALL,
    "hopper": LATER,
    "interfaces": ("lesson05",),
    "kernels": ("lesson05",),
    "measure/test_budget.py": ALL,
    "measure/test_gpus.py": ("lesson00",),
    "measure/test_memory.py": ("lesson01", "lesson03"),
    "measure/test_profiler.py": ("lesson04",),
    "measure/test_roofline.py": ("lesson00", "lesson01", "lesson03", "lesson04"),
    "measure/test_traffic.py": ("lesson01", "lesson03"),
    "peers": ("lesson05",),
    "test_answers.py": ALL,
    "test_checkpoint.py": ("lesson01", "lesson04"),
    "test_claims.py": ALL,
    "test_colab.py": ALL,
    "test_containers.py": ALL,
    "test_continuous_integration.py": ALL,
    "test_conversion.py": ("lesson04",),
    "test_corpus.py": ("lesson01",),
    "test_decode_results.py": ("lesson04",),
    "test_docstrings.py": ALL,
    "test_doctor.py": ("lesson00",),
    "test_examples.py": ALL,
    "test_families.py": ("lesson04",),
    "test_fresh.py": ALL,
    "test_generate.py": ("lesson04",),
    "test_generate_changes.py": ("lesson04",),
    "test_house.py": ALL,
    "test_lessons.py": ALL,
    "test_minillm_document.py": ("lesson04",),
    "test_model.py": ("lesson01", "lesson04"),
    "test_notebooks.py": ALL,
    "test_project_files.py": ALL,
    "test_rope.py": ("lesson04",),
    "test_run_tests.py": ALL,
    "test_sampling.py": ("lesson04",),
    "test_setup.py": ALL,
    "test_widgets.py": ALL,
}


def marks_of(nodeid: str, units: Iterable[str], tasks: dict[str, str]) -> tuple[str, ...]:
    """The marks of a test; none where its file has no place in FILES.

    Args:
        nodeid: pytest's, such as "tests/cache/test_contiguous.py::test_fork[2 rows]".
        units: such as "03_tiling".
        tasks: the unit of each task.
    """
    for unit in units:
        if unit in nodeid:
            return (f"lesson{unit[:2]}",)
    path, _, name = nodeid.partition("::")
    path = path.removeprefix("tests/")
    task = re.search(r"\[(\w+)", name)
    if path.startswith("exercises/") and task and task[1] in tasks:
        return (f"lesson{tasks[task[1]][:2]}",)
    fitting = [place for place in FILES if f"{path}/".startswith(f"{place}/")]
    return FILES[max(fitting, key=len)] if fitting else ()

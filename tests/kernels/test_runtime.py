"""Where kernels run is decided before Triton is needed, also where it has been imported already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
{before}
from kernels.runtime import prepare
assert prepare().name == "interpreter", prepare()
import torch, triton, triton.language as tl
@triton.jit
def kernel(x, out, N: tl.constexpr):
    places = tl.arange(0, N)
    values = tl.load(x + places) + tl.zeros((N,), tl.float32)
    tl.store(out, tl.sum(values, 0) + values.sum(0) + tl.cdiv(5, 2))
x, out = torch.arange(4.0), torch.zeros(1)
kernel[(1,)](x, out, N=4)
assert out.item() == 15.0, out
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here: the interpreter was not prepared")
@pytest.mark.parametrize("before", ["", "import triton.language", "import torch.library, transformers"])
def test_a_kernel_is_interpreted_whichever_module_imported_triton_first(before, tmp_path):
    if "transformers" in before:
        pytest.importorskip("transformers", reason="no transformers: its import of Triton was not tried")
    script = tmp_path / "script.py"  # the interpreter reads the kernel's source from a file
    script.write_text(SCRIPT.format(before=before))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]

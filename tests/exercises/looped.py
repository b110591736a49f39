"""Answers to the stop `looped`: the source of a cell each, for a kernel is compiled with its module."""

from tests.exercises.answers import Wrong, defined

OWN_LOADS = """
import triton
import triton.language as tl
from kernels.tiles import load_tile


@triton.jit
def looped(q, k, v, out, stride, scale, n, B: tl.constexpr, D: tl.constexpr):
    start = tl.program_id(0) * B
    q_tile = load_tile(q + start * stride, stride, n - start, B, D, D, WHOLE=False)
    m, l = tl.full((B,), float("-inf"), tl.float32), tl.zeros((B,), tl.float32)
    acc = tl.zeros((B, D), tl.float32)
    for j in range(0, n, B):
        columns = j + tl.arange(0, B)
        places = columns[:, None] * stride + tl.arange(0, D)[None, :]
        k_tile = tl.load(k + places, mask=(columns < n)[:, None], other=0.0)
        v_tile = tl.load(v + places, mask=(columns < n)[:, None], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        s = tl.where((columns < n)[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - new[:, None])
        old = tl.exp(m - new)
        l = l * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p, v_tile, input_precision="ieee")
        m = new
    rows = start + tl.arange(0, B)[:, None]
    tl.store(out + rows * stride + tl.arange(0, D)[None, :], acc / l[:, None], mask=rows < n)
"""
IN_BASE_2 = OWN_LOADS.replace("* scale\n", "* scale * 1.4426950408889634\n").replace("tl.exp(", "tl.exp2(")

RIGHT = {"loads of its own": defined(OWN_LOADS, "looped"), "base 2": defined(IN_BASE_2, "looped")}


def slip(*changes: str, name: str, told: str) -> Wrong:
    source = OWN_LOADS
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source
        source = source.replace(old, new)
    return Wrong(name, defined(source, "looped"), told)


WHERE = '        s = tl.where((columns < n)[None, :], s, float("-inf"))\n'

WRONG = [
    slip(WHERE, "", name="no mask", told="the tail is not masked"),
    slip('s, float("-inf"))', "s, 0.0)", name="a tail with score 0", told="the tail is not masked"),
    slip("(columns < n)[None, :]", "(tl.arange(0, B) < n)[None, :]", name="a mask of the tile", told="the tail is not masked"),
    slip("(columns < n)[:, None]", "(tl.arange(0, B) < n)[:, None]", name="rows from n on", told="the last one has n - j rows"),
    slip("(columns < n)[None, :]", "(columns <= n)[None, :]", name="one key too many", told="keys j + tl.arange(0, B) < n"),
    slip("(columns < n)[None, :]", "(columns + 1 < n)[None, :]", name="one key too few", told="key n - 1 is there too"),
    slip("acc * old[:, None]", "acc", name="acc not rescaled", told="acc is not rescaled"),
    slip("l * old", "l", name="l not rescaled", told="l is not rescaled"),
    slip("l * old", "l", "acc * old[:, None]", "acc", name="nothing rescaled", told="nothing is rescaled"),
    slip("        m = new\n", "", name="m not carried on", told="m is not carried on"),
    slip("* scale\n", "\n", name="no scale", told="the scale is forgotten"),
    slip("* scale\n", "* D ** -0.5\n", name="a scale of its own", told="the argument `scale`"),
    slip("tl.exp(", "tl.exp2(", name="base 2", told="in base 2"),
    slip("        m = new\n", "        m = new\n        acc = acc / l[:, None]\n", name="divided in the loop", told="divided by l already"),
    slip("tl.max(s, 1)", "tl.max(s)", name="the largest of all queries", told="that of the whole tile"),
    slip("tl.trans(k_tile)", "k_tile", name="k as it is", told="in the line: s = tl.dot(q_tile, k_tile"),
    slip("columns[:, None] * stride", "columns[:, None] * D", name="rows without the stride", told="begins j * stride"),
    slip("@triton.jit", "", name="no Triton function", told="keep the line @triton.jit"),
]

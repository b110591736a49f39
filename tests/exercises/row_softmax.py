"""Answers to the stop `row_softmax`: the source of a cell each, for a kernel is compiled with its module."""

from tests.exercises.answers import Wrong, defined

IN_BASE_2 = """
import triton
import triton.language as tl


@triton.jit
def row_softmax(x, out, stride, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    begin = tl.program_id(0) * stride
    scores = tl.load(x + begin + columns, mask=columns < n, other=0.0)
    scores = tl.where(columns < n, scores * 1.4426950408889634, float("-inf"))
    p = tl.exp2(scores - tl.max(scores))
    total = tl.sum(p)
    tl.store(out + begin + columns, p / total, mask=columns < n)
"""

RIGHT = {"base 2, masked by where": defined(IN_BASE_2, "row_softmax")}


def slip(*changes: str, name: str, told: str) -> Wrong:
    source = IN_BASE_2
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source
        source = source.replace(old, new)
    return Wrong(name, defined(source, "row_softmax"), told)


WHERE = "scores = tl.where(columns < n, scores * 1.4426950408889634, float(\"-inf\"))"

WRONG = [
    slip(WHERE, "scores = scores * 1.4426950408889634", name="a tail of zeros", told="load it as −∞"),
    slip(WHERE, "scores = scores * 1.4426950408889634", ", other=0.0", "", name="a load without other", told="load it as −∞"),
    slip("begin = tl.program_id(0) * stride", "begin = 0 * stride", name="all programs take row 0", told="each program takes row 0"),
    slip("tl.load(x + begin +", "tl.load(x +", name="all programs read row 0", told="each program takes row 0"),
    slip("program_id(0) * stride", "program_id(0) * n", name="rows without the stride", told="begin where `stride` says"),
    slip("p / total", "p", name="not divided", told="does not add up to 1"),
    slip("* 1.4426950408889634", "", name="base 2", told="the exponential is in base 2"),
    slip(" - tl.max(scores)", "", name="no maximum", told="exp overflows above 88"),
    slip("p / total, mask=columns < n", "p / total", name="a store without a mask", told="store under a mask"),
    slip("@triton.jit", "", name="no Triton function", told="keep the line @triton.jit"),
]

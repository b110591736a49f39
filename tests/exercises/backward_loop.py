"""Answers to `backward_loop`: the source of a cell each, for a kernel is compiled with its module."""

from tests.exercises.answers import Wrong, defined

QUERIES_AS_ROWS = """
import triton
import triton.language as tl


@triton.jit
def backward_loop(
    dk, dv, k_tile, v_tile, first, q, grad_out, lse, delta, begin, n_q, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    for i in range(begin, n_q, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        places = rows[:, None] * D + tl.arange(0, D)[None, :]
        q_tile = tl.load(q + places, mask=rows[:, None] < n_q, other=0.0)
        do = tl.load(grad_out + places, mask=rows[:, None] < n_q, other=0.0)
        lse_rows = tl.load(lse + rows, mask=rows < n_q, other=0.0)
        delta_rows = tl.load(delta + rows, mask=rows < n_q, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        s = tl.where(rows[:, None] >= first[None, :], s, float("-inf"))
        p = tl.exp(s - lse_rows[:, None])
        dv += tl.dot(tl.trans(p), do, input_precision="ieee")
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - delta_rows[:, None])
        dk += tl.dot(tl.trans(ds), q_tile, input_precision="ieee")
    return dk * scale, dv
"""

RIGHT = {"queries as rows, the scale at the end": defined(QUERIES_AS_ROWS, "backward_loop")}


def slip(old: str, new: str, *, name: str, told: str) -> Wrong:
    assert old in QUERIES_AS_ROWS
    return Wrong(name, defined(QUERIES_AS_ROWS.replace(old, new), "backward_loop"), told)


WRONG = [
    slip("dp - delta_rows[:, None]", "dp", name="no delta", told="δ is forgotten"),
    slip("dp - delta_rows", "dp + delta_rows", name="delta added", told="δ is added"),
    slip("dk * scale", "dk", name="no scale", told="the scale is forgotten"),
    slip("dk * scale", "dk * scale * scale", name="scaled twice", told="the scale is there twice"),
    slip(">= first", "> first", name="strict mask", told="off by one: the query at first sees the key"),
    slip(">= first", ">= -1 + first", name="one query too many", told="the query before first does not see it"),
    slip(">= first", ">= -9999 + first", name="no mask", told="there is no mask"),
    slip("s - lse_rows[:, None]", "s", name="not normalised", told="P is not normalised"),
    slip("tl.trans(ds), q_tile", "tl.trans(p), q_tile", name="dK of P", told="dK is made of P"),
    slip("tl.trans(v_tile)", "tl.trans(k_tile)", name="dP of K", told="dP is made of K"),
    slip("range(begin, n_q", "range(0, n_q", name="hidden tiles too", told="skip those that no query sees"),
    slip("do = tl.load", "q_tile = tl.load(q + places, mask=rows[:, None] < n_q, other=0.0)\n        do = tl.load",
         name="q loaded twice", told="load each once"),
    slip("@triton.jit", "", name="no Triton function", told="keep the line @triton.jit"),
]

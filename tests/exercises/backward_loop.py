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
S, P = '"ieee") * scale', "p = tl.exp(s - lse_rows[:, None])"
LOADED = "tl.load({} + places, mask=rows[:, None] < n_q, other=0.0)"
IN_BASE_2 = QUERIES_AS_ROWS.replace(S, f"{S} * 1.4426950408889634").replace(
    P, "p = tl.exp2(s - lse_rows[:, None] * 1.4426950408889634)"
)
DESCRIPTORS = (
    QUERIES_AS_ROWS.replace(LOADED.format("q"), "queries.load([i, 0])")
    .replace(LOADED.format("grad_out"), "grads.load([i, 0])")
    .replace(
        "    for i in",
        "    queries = tl.make_tensor_descriptor(q, [n_q, D], [D, 1], [BLOCK, D])\n"
        "    grads = tl.make_tensor_descriptor(grad_out, [n_q, D], [D, 1], [BLOCK, D])\n    for i in",
    )
)

RIGHT = {
    "queries as rows, the scale at the end": defined(QUERIES_AS_ROWS, "backward_loop"),
    "in base 2": defined(IN_BASE_2, "backward_loop"),
    "tensor descriptors": defined(DESCRIPTORS, "backward_loop"),
}


def slip(*changes: str, name: str, told: str) -> Wrong:
    source = QUERIES_AS_ROWS
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source
        source = source.replace(old, new)
    return Wrong(name, defined(source, "backward_loop"), told)


EXCHANGED = ("rows[:, None] * D + tl.arange(0, D)", "rows[:, None] * BLOCK + tl.arange(0, BLOCK)")
OF_16 = ("n_q, BLOCK)", "n_q, 16)", "tl.arange(0, BLOCK)", "tl.arange(0, 16)")

WRONG = [
    slip("dp - delta_rows[:, None]", "dp", name="no delta", told="δ is forgotten"),
    slip("dp - delta_rows", "dp + delta_rows", name="delta added", told="δ is added"),
    slip("delta + rows", "delta + rows - i", name="delta of the first tile", told="δ is the first tile's in each tile"),
    slip("lse + rows", "lse + rows - i", name="lse of the first tile", told="lse is the first tile's in each tile"),
    slip("lse + rows", "lse + rows - i", "delta + rows", "delta + rows - i", name="lse and delta of the first tile",
         told="lse and δ are the first tile's"),
    slip("dk * scale", "dk", name="no scale", told="the scale is forgotten in dK"),
    slip("dk * scale", "dk * scale * scale", name="scaled twice", told="the scale is there twice"),
    slip(S, '"ieee")', name="scores without the scale", told="the scale is forgotten in the scores"),
    slip("* scale", "* D ** -0.5", name="a scale of its own", told="take the argument `scale`"),
    slip("dk * scale", "dk * D ** -0.5", name="a scale of its own in dK", told="take the argument `scale`"),
    slip(">= first", "> first", name="strict mask", told="off by one: the query at first sees the key"),
    slip(">= first", ">= -1 + first", name="one query too many", told="the query before first does not see it"),
    slip(">= first", ">= -9999 + first", name="no mask", told="there is no mask"),
    slip("s - lse_rows[:, None]", "s", name="not normalised", told="P is not normalised"),
    slip("tl.exp(", "tl.exp2(", name="base 2", told="P is in base 2"),
    slip(S, f"{S} * 1.4426950408889634", "tl.exp(", "tl.exp2(", name="lse in base e", told="multiply lse by log2(e) too"),
    slip("tl.trans(ds), q_tile", "tl.trans(p), q_tile", name="dK of P", told="dK is made of P"),
    slip("tl.trans(v_tile)", "tl.trans(k_tile)", name="dP of K", told="dP is made of K"),
    slip("tl.dot(tl.trans(p)", "tl.dot(p", name="P as it is", told="P is not transposed"),
    slip("tl.dot(tl.trans(ds)", "tl.dot(ds", name="dS as it is", told="dS is not transposed"),
    slip("tl.dot(tl.trans(p)", "tl.dot(p", "tl.dot(tl.trans(ds)", "tl.dot(ds", name="P and dS as they are",
         told="P and dS are not transposed"),
    slip("tl.trans(k_tile)", "k_tile", name="k as it is", told="Is a tl.trans missing"),
    slip("tl.load(lse + rows, mask=rows < n_q, other=0.0)", "tl.load(lse + rows)", name="lse without a mask",
         told="behind the end of lse: row 21, where the last one is 20"),
    slip("tl.load(delta + rows, mask=rows < n_q, other=0.0)", "tl.load(delta + rows)", name="delta without a mask",
         told="behind the end of delta: row 21"),
    slip(LOADED.format("q"), "tl.load(q + places)", name="q without a mask", told="behind the end of q: row 21"),
    slip("mask=rows < n_q, other=0.0", "mask=rows < n_q", name="lse and delta without other", told="without other= is undefined"),
    slip(*EXCHANGED, name="D and BLOCK exchanged", told="a tile not (BLOCK, D)?"),
    slip("rows[:, None] * D", "rows[:, None] * BLOCK", name="rows of BLOCK numbers", told="it lies at i * D"),
    slip(*OF_16, name="tiles of 16", told="that is a tile every 16 rows"),
    slip("range(begin, n_q", "range(0, n_q", name="hidden tiles too", told="begin at `begin`"),
    slip("do = tl.load", "q_tile = tl.load(q + places, mask=rows[:, None] < n_q, other=0.0)\n        do = tl.load",
         name="q loaded twice", told="load each once"),
    slip("@triton.jit", "", name="no Triton function", told="keep the line @triton.jit"),
]

"""Answers to `forward_loop`: the source of a cell each, for a kernel is compiled with its module."""

from tests.exercises.answers import Wrong, defined

BASE_2 = """
import triton
import triton.language as tl


@triton.jit
def load(pointer, j, n, D: tl.constexpr, BLOCK: tl.constexpr):
    rows = j + tl.arange(0, BLOCK)
    return tl.load(pointer + rows[:, None] * D + tl.arange(0, D)[None, :], mask=rows[:, None] < n, other=0.0)


@triton.jit
def forward_loop(
    acc, m, l, q_tile, first, last, k, v, begin, stop, n_k, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    unit = scale * 1.4426950408889634
    for j in range(begin, stop, BLOCK):
        s = tl.dot(q_tile, tl.trans(load(k, j, n_k, D, BLOCK)), input_precision="ieee") * unit
        columns = j + tl.arange(0, BLOCK)
        s = tl.where((columns[None, :] >= first[:, None]) & (columns[None, :] <= last[:, None]), s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        old = tl.exp2(m - shift)
        l = l * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p, load(v, j, n_k, D, BLOCK), input_precision="ieee")
        m = new
    return acc, m, l
"""
LEFTWARDS = (
    BASE_2.replace(
        "for j in range(begin, stop, BLOCK):",
        "for t in range(0, stop - begin, BLOCK):\n        j = (stop - 1) // BLOCK * BLOCK - t",
    )
    .replace("new = tl.maximum(m, tl.max(s, 1))", "new = tl.maximum(m, tl.maximum(tl.max(s, 1), -1e30))")
    .replace("shift = tl.where(new == float(\"-inf\"), 0.0, new)", "shift = new")
)
P_MASKED = BASE_2.replace("p = tl.exp2(s - shift[:, None])", "p = tl.where(s == float('-inf'), 0.0, tl.exp2(s - new[:, None]))").replace(
    "old = tl.exp2(m - shift)", "old = tl.where(m == float('-inf'), 0.0, tl.exp2(m - new))"
)
CALLS = ("load(k, j, n_k, D, BLOCK)", "load(v, j, n_k, D, BLOCK)")
ASKED_BY = "    unit = scale"
DESCRIPTORS = (
    BASE_2.replace(CALLS[0], "keys.load([j, 0])")
    .replace(CALLS[1], "values.load([j, 0])")
    .replace(
        ASKED_BY,
        "    keys = tl.make_tensor_descriptor(k, [n_k, D], [D, 1], [BLOCK, D])\n"
        "    values = tl.make_tensor_descriptor(v, [n_k, D], [D, 1], [BLOCK, D])\n" + ASKED_BY,
    )
)
BLOCK_POINTERS = (
    BASE_2.replace(CALLS[0], 'tl.load(keys, boundary_check=(0,), padding_option="zero")')
    .replace(CALLS[1], 'tl.load(values, boundary_check=(0,), padding_option="zero")')
    .replace(
        ASKED_BY,
        "    keys = tl.make_block_ptr(k, (n_k, D), (D, 1), (begin, 0), (BLOCK, D), (1, 0))\n"
        "    values = tl.make_block_ptr(v, (n_k, D), (D, 1), (begin, 0), (BLOCK, D), (1, 0))\n" + ASKED_BY,
    )
    .replace("        m = new\n", "        m = new\n        keys, values = tl.advance(keys, (BLOCK, 0)), tl.advance(values, (BLOCK, 0))\n")
)

RIGHT = {
    "base 2, loads in a function": defined(BASE_2, "forward_loop"),
    "from the diagonal to the left, with a lowest m": defined(LEFTWARDS, "forward_loop"),
    "hidden keys and a first tile are masked by where": defined(P_MASKED, "forward_loop"),
    "tensor descriptors": defined(DESCRIPTORS, "forward_loop"),
    "block pointers": defined(BLOCK_POINTERS, "forward_loop"),
}


def slip(*changes: str, name: str, told: str) -> Wrong:
    source = BASE_2
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source
        source = source.replace(old, new)
    return Wrong(name, defined(source, "forward_loop"), told)


IN_TORCH = """
import numpy as np
import triton
import triton.language as tl


def at_once(acc, m, l, q_tile, first, last, k, v, n_k, scale, D):
    row = np.arange(int(n_k.handle.data[0]))
    floats = np.ctypeslib.ctypes.c_float * (len(row) * D)
    memory = [np.ctypeslib.as_array(floats.from_address(int(x.handle.data[0]))).reshape(-1, D) for x in (k, v)]
    scores = torch.from_numpy(q_tile.handle.data) @ torch.from_numpy(memory[0]).T * float(scale)
    hidden = (row[None] > last.handle.data[:, None]) | (row[None] < first.handle.data[:, None])
    scores = scores.masked_fill(torch.from_numpy(hidden), -torch.inf)
    largest = scores.amax(1)
    p = (scores - largest[:, None]).exp().nan_to_num()
    for tensor, result in ((acc, p @ torch.from_numpy(memory[1])), (m, largest), (l, p.sum(1))):
        tensor.handle.data = result.numpy()
    return acc, m, l


@triton.jit
def forward_loop(
    acc, m, l, q_tile, first, last, k, v, begin, stop, n_k, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    return at_once(acc, m, l, q_tile, first, last, k, v, n_k, scale, D)
"""
LOG2E = "1.4426950408889634"
WHERE = "(columns[None, :] >= first[:, None]) & (columns[None, :] <= last[:, None])"
ROW = "rows[:, None] * D + tl.arange(0, D)[None, :]"

WRONG = [
    slip("acc * old[:, None]", "acc", name="acc not rescaled", told="acc is not rescaled"),
    slip("l * old", "l", name="l not rescaled", told="l is not rescaled"),
    slip("l * old", "l", "acc * old[:, None]", "acc", name="nothing rescaled", told="nothing is rescaled"),
    slip("        m = new\n", "", name="m not carried on", told="m is not carried on"),
    slip("tl.maximum(m, tl.max(s, 1))", "tl.max(s, 1)", name="the largest of the tile alone", told="is no maximum, or falls"),
    slip("tl.max(s, 1)", "tl.max(s)", name="the largest of all queries", told="that of the whole tile"),
    slip(f"unit = scale * {LOG2E}", "unit = scale", name="base 2", told="in base 2: multiply the scores"),
    slip(f"unit = scale * {LOG2E}", "unit = scale", "tl.exp2(m", "tl.exp(m", name="P in base 2", told="P is in base 2, and"),
    slip(f"unit = scale * {LOG2E}", "unit = scale", "tl.exp2(s", "tl.exp(s", name="rescaling in base 2", told="P is in base e"),
    slip("unit = scale *", "unit =", name="no scale", told="the scale is forgotten"),
    slip("unit = scale *", "unit = D ** -0.5 *", name="a scale of its own", told="the scale is D ** -0.5"),
    slip("<= last", "< last", name="last is not seen", told="off by one: a query sees its last key too"),
    slip(">= first", "> first", name="first is not seen", told="off by one: a query sees its first key too"),
    slip("<= last", "<= 1 + last", name="one key too many", told="each query sees a key behind last"),
    slip(">= first", ">= -1 + first", name="one key too many before", told="each query sees a key before first"),
    slip(WHERE, "columns[None, :] >= 0 * first[:, None]", name="no mask", told="no key is hidden"),
    slip(WHERE, "columns[None, :] <= last[:, None]", name="no left end", told="does not ask for first ≤ j"),
    slip(WHERE, "(columns[None, :] >= first[:, None]) & (columns < n_k)[None, :]", name="no right end",
         told="does not ask for j ≤ last"),
    slip("columns = j + tl.arange", "columns = 0 + tl.arange", name="columns of the tile", told="from the tile's begin"),
    slip('s, float("-inf"))', "s, 0.0)", name="hidden keys have score 0", told="a hidden key has score 0"),
    slip('s, float("-inf"))', "s, -1e30)", name="hidden keys have a low score", told="a low score and not −∞"),
    slip('shift = tl.where(new == float("-inf"), 0.0, new)', "shift = new", name="−∞ − (−∞)", told="−∞ − (−∞) is NaN"),
    slip("tl.exp2(m - shift)", "tl.exp2(m - new)", name="−∞ − (−∞) in the rescaling", told="−∞ − (−∞) is NaN"),
    slip(
        "range(begin, stop, BLOCK)",
        "range(begin, n_k // BLOCK * BLOCK, BLOCK)",
        name="no tail",
        told="the last keys are missing",
    ),
    slip("return acc, m, l", "return acc / l[:, None], m, l", name="divided already", told="divided by l already"),
    slip("        m = new\n", "        m = new\n        acc = acc / tl.where(l == 0, 1, l)[:, None]\n",
         name="divided in the loop", told="divided by l already"),
    slip("return acc, m, l", "return acc, m", name="two results", told="return what the program takes"),
    slip("tl.trans(load(k, j, n_k, D, BLOCK))", "load(k, j, n_k, D, BLOCK)", name="k as it is", told="Is a tl.trans missing"),
    slip(ROW, ROW.replace("* D", "* BLOCK"), name="rows of BLOCK numbers", told="it lies at j * D"),
    slip(ROW, ROW.replace("* D", "* 16"), name="rows of 16 numbers", told="it lies at j * D"),
    slip("D, BLOCK)", "BLOCK, D)", name="D and BLOCK exchanged", told="a tile not (BLOCK, D)?"),
    slip("stop, BLOCK)", "stop, D)", name="steps of D", told="the loop steps by D"),
    slip("stop, BLOCK)", "stop, 16)", "D, BLOCK)", "D, 16)", "columns = j + tl.arange(0, BLOCK)", "columns = j + tl.arange(0, 16)",
         name="tiles of 16", told="that is a tile every 16 rows"),
    slip(", mask=rows[:, None] < n, other=0.0", "", name="loads without a mask", told="behind the end of k: row 9, where the last one is 8"),
    slip(", other=0.0", "", name="loads without other", told="without other= is undefined"),
    slip("range(begin, ", "range(0, ", name="tiles before the window", told="begin at `begin`"),
    slip(", stop, BLOCK)", ", n_k, BLOCK)", name="tiles behind the window", told="stop at `stop`"),
    slip("range(begin, stop, BLOCK)", "range(0, n_k, BLOCK)", name="all tiles", told="walk from `begin` to `stop`"),
    slip("load(v, j, n_k, D, BLOCK),", "load(v, j, n_k, D, BLOCK) + 0 * load(v, j, n_k, D, BLOCK),", name="v loaded twice",
         told="load each once"),
    slip("@triton.jit\ndef forward_loop", "def forward_loop", name="no Triton function", told="keep the line @triton.jit"),
    Wrong("all of it in torch", defined(IN_TORCH, "forward_loop"), "tl.load and tl.dot must do the work"),
]

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
def forward_loop(acc, m, l, q_tile, last, k, v, stop, n_k, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    unit = scale * 1.4426950408889634
    for j in range(0, stop, BLOCK):
        s = tl.dot(q_tile, tl.trans(load(k, j, n_k, D, BLOCK)), input_precision="ieee") * unit
        s = tl.where((j + tl.arange(0, BLOCK))[None, :] <= last[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        old = tl.exp2(m - new)
        l = l * old + tl.sum(p, 1)
        acc = acc * old[:, None] + tl.dot(p, load(v, j, n_k, D, BLOCK), input_precision="ieee")
        m = new
    return acc, m, l
"""
LEFTWARDS = BASE_2.replace(
    "for j in range(0, stop, BLOCK):", "for t in range(0, stop, BLOCK):\n        j = (stop - 1) // BLOCK * BLOCK - t"
).replace("new = tl.maximum(m, tl.max(s, 1))", "new = tl.maximum(m, tl.maximum(tl.max(s, 1), -1e30))")

RIGHT = {
    "base 2, loads in a function": defined(BASE_2, "forward_loop"),
    "from the diagonal to the left": defined(LEFTWARDS, "forward_loop"),
}


def slip(old: str, new: str, *, name: str, told: str) -> Wrong:
    assert old in BASE_2
    return Wrong(name, defined(BASE_2.replace(old, new), "forward_loop"), told)


IN_TORCH = """
import numpy as np
import triton
import triton.language as tl


def at_once(acc, m, l, q_tile, last, k, v, stop, n_k, scale, D, BLOCK):
    row = np.arange(int(n_k.handle.data[0]))
    floats = np.ctypeslib.ctypes.c_float * (len(row) * 16)
    memory = [np.ctypeslib.as_array(floats.from_address(int(x.handle.data[0]))).reshape(-1, 16) for x in (k, v)]
    scores = torch.from_numpy(q_tile.handle.data) @ torch.from_numpy(memory[0]).T * 0.25
    scores = scores.masked_fill(torch.from_numpy(row[None] > last.handle.data[:, None]), -torch.inf)
    largest = scores.amax(1)
    p = (scores - largest[:, None]).exp()
    for tensor, result in ((acc, p @ torch.from_numpy(memory[1])), (m, largest), (l, p.sum(1))):
        tensor.handle.data = result.numpy()
    return acc, m, l


@triton.jit
def forward_loop(acc, m, l, q_tile, last, k, v, stop, n_k, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    return at_once(acc, m, l, q_tile, last, k, v, stop, n_k, scale, D, BLOCK)
"""

WRONG = [
    slip("acc * old[:, None]", "acc", name="acc not rescaled", told="acc is not rescaled"),
    slip("l * old", "l", name="l not rescaled", told="l is not rescaled"),
    slip("old = tl.exp2(m - new)", "old = tl.exp2(new - new)", name="nothing rescaled", told="nothing is rescaled"),
    slip("unit = scale * 1.4426950408889634", "unit = scale", name="base 2", told="in base 2: multiply the scores"),
    slip("unit = scale *", "unit =", name="no scale", told="the scale is forgotten"),
    slip("<= last", "< last", name="strict mask", told="off by one: a query sees its last key too"),
    slip("<= last", "<= 1 + last", name="one key too many", told="one key too many"),
    slip(
        "[None, :] <= last[:, None]", "[None, :] <= stop * 2 + last[:, None]", name="no mask", told="there is no mask"
    ),
    slip(
        "range(0, stop, BLOCK)",
        "range(0, n_k // BLOCK * BLOCK, BLOCK)",
        name="no tail",
        told="the last keys are missing",
    ),
    slip("return acc, m, l", "return acc, m", name="two results", told="not enough values to unpack"),
    slip("range(0, stop, BLOCK)", "range(0, n_k, BLOCK)", name="hidden tiles too", told="skip those that no query sees"),
    slip("load(v, j, n_k, D, BLOCK),", "load(v, j, n_k, D, BLOCK) + 0 * load(v, j, n_k, D, BLOCK),", name="v loaded twice",
         told="load each once"),
    slip("@triton.jit\ndef forward_loop", "def forward_loop", name="no Triton function", told="keep the line @triton.jit"),
    Wrong("all of it in torch", defined(IN_TORCH, "forward_loop"), "tl.load and tl.dot must do the work"),
]

"""Answers to `flash_forward`."""

import torch

from tests.exercises.answers import Wrong, changed


def mask_on_the_diagonal_only(q, k, v, out, block_q, block_k):
    """The scale in q, and the mask added only where a tile reaches above the diagonal."""
    n, d = q.shape
    for i in range(0, n, block_q):
        stop = min(i + block_q, n)
        tile = q.load(slice(i, stop)) * d**-0.5
        m, l, acc = torch.full((stop - i,), -torch.inf), torch.zeros(stop - i), torch.zeros(stop - i, d)
        for j in range(0, stop, block_k):
            k_tile = k.load(slice(j, min(j + block_k, n)))
            s = tile @ k_tile.T
            if j + len(k_tile) > i + 1:
                s = s + torch.full_like(s, -torch.inf).triu(i - j + 1)
            new = torch.maximum(m, s.max(dim=1).values)
            p, old = torch.exp(s - new[:, None]), torch.exp(m - new)
            l = old * l + p.sum(1)
            acc = old[:, None] * acc + p @ v.load(slice(j, min(j + block_k, n)))
            m = new
        out.store(acc / l[:, None], slice(i, stop))


def by_merging(q, k, v, out, block_q, block_k):
    """From the diagonal to the left, a normalised output and its lse merged with those of each tile."""
    n, d = q.shape
    for i in range(0, n, block_q):
        q_tile = q.load(slice(i, i + block_q))
        row = torch.arange(i, i + len(q_tile))
        result, lse = torch.zeros(len(row), d), torch.full((len(row), 1), -torch.inf)
        for j in reversed(range(0, i + len(row), block_k)):
            k_tile = k.load(slice(j, j + block_k))
            s = q_tile @ k_tile.T / d**0.5
            s[torch.arange(j, j + len(k_tile))[None] > row[:, None]] = -torch.inf
            del k_tile
            largest = s.amax(1, keepdim=True).nan_to_num(neginf=0)
            p = (s - largest).exp()
            total = p.sum(1, keepdim=True)
            part = p @ v.load(slice(j, j + block_k)) / total.clamp(min=1e-30)
            part_lse = largest + total.log()
            both = torch.logaddexp(lse, part_lse)
            share = (part_lse - both).exp().nan_to_num(0)
            result, lse = (1 - share) * result + share * part, both
        out.store(result, slice(i, i + block_q))


RIGHT = {"mask on the diagonal only": mask_on_the_diagonal_only, "tiles merged, leftwards": by_merging}


def naive(q, k, v, out, block_q, block_k):
    Q, K, V = (x.load(slice(None)) for x in (q, k, v))
    n, d = Q.shape
    scores = (Q @ K.T / d**0.5).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    out.store(scores.softmax(-1) @ V, slice(None))


def naive_from_copies(q, k, v, out, block_q, block_k):
    """Tile by tile onto the chip, and kept there as copies: only the traffic gives it away."""
    n, d = q.shape
    Q, K, V = (torch.cat([x.load(slice(i, i + block_k)).clone() for i in range(0, n, block_k)]) for x in (q, k, v))
    scores = (Q @ K.T / d**0.5).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    out.store(scores.softmax(-1) @ V, slice(None))


def naive_with_idle_loads(q, k, v, out, block_q, block_k):
    """The same, and then as many unused loads as the tiles would have taken."""
    naive_from_copies(q, k, v, out, block_q, block_k)
    for i in range(block_q, q.shape[0], block_q):
        for j in range(0, i, block_k):
            k.load(slice(j, j + block_k)), v.load(slice(j, j + block_k))


def a_row_of_scores(q, k, v, out, block_q, block_k):
    """The plain softmax: nothing is carried from tile to tile."""
    n, d = q.shape
    for i in range(0, n, block_q):
        tile, last = q.load(slice(i, i + block_q)), min(i + block_q, n)
        s = torch.cat([tile @ k.load(slice(j, min(j + block_k, last))).T for j in range(0, last, block_k)], 1)
        p = (s / d**0.5 + torch.full_like(s, -torch.inf).triu(i + 1)).softmax(-1)
        parts = (p[:, j : j + block_k] @ v.load(slice(j, min(j + block_k, last))) for j in range(0, last, block_k))
        out.store(sum(parts), slice(i, i + block_q))


def values_kept(q, k, v, out, block_q, block_k):
    n, d = q.shape
    V = torch.cat([v.load(slice(i, i + block_k)).clone() for i in range(0, n, block_k)])
    for i in range(0, n, block_q):
        tile = q.load(slice(i, i + block_q))
        last = min(i + block_q, n)
        s = torch.cat([tile @ k.load(slice(j, min(j + block_k, last))).T for j in range(0, last, block_k)], 1) / d**0.5
        s = s + torch.full_like(s, -torch.inf).triu(i + 1)
        out.store(s.softmax(-1) @ V[:last], slice(i, i + block_q))


def a_row_of_keys(q, k, v, out, block_q, block_k):
    """Only the queries are tiled."""
    n, d = q.shape
    for i in range(0, n, block_q):
        tile = q.load(slice(i, i + block_q))
        s = tile @ k.load(slice(0, i + block_q)).T / d**0.5
        s = s + torch.full_like(s, -torch.inf).triu(i + 1)
        out.store(s.softmax(-1) @ v.load(slice(0, i + block_q)), slice(i, i + block_q))


def in_columns(q, k, v, out, block_q, block_k):
    """Half of each row at a time, so that more rows fit."""
    n, d = q.shape
    for i in range(0, n, block_q):
        half = [q.load(slice(i, i + block_q), slice(c, c + d // 2)) for c in (0, d // 2)]
        out.store(torch.cat(half, 1), slice(i, i + block_q))


def keys_outside(q, k, v, out, block_q, block_k):
    """FlashAttention-1's order: the unfinished output goes to HBM and back."""
    n, d = q.shape
    m, l = torch.full((n, 1), -torch.inf), torch.zeros(n, 1)
    for j in range(0, n, block_k):
        k_tile, v_tile = k.load(slice(j, j + block_k)), v.load(slice(j, j + block_k))
        for i in range(j // block_q * block_q, n, block_q):
            rows = slice(i, min(i + block_q, n))
            s = q.load(rows) @ k_tile.T / d**0.5
            s = s.masked_fill(torch.arange(j, j + s.shape[1]) > torch.arange(i, i + len(s))[:, None], -torch.inf)
            new = torch.maximum(m[rows], s.amax(1, keepdim=True))
            shift = new.nan_to_num(neginf=0)
            p, old = (s - shift).exp(), (m[rows] - shift).exp()
            before = out.load(rows) * l[rows] if j else torch.zeros(len(s), d)
            l[rows] = old * l[rows] + p.sum(1, keepdim=True)
            out.store((old * before + p @ v_tile) / l[rows].clamp(min=1e-30), rows)
            m[rows] = new


def padded(q, k, v, out, block_q, block_k):
    """As on a GPU, where a tile always has its full size; the padding is not masked."""
    n, d = q.shape
    for i in range(0, n, block_q):
        tile = q.load(slice(i, i + block_q))
        m, l, acc = torch.full((len(tile), 1), -torch.inf), torch.zeros(len(tile), 1), torch.zeros(len(tile), d)
        for j in range(0, min(i + block_q, n), block_k):
            k_tile, v_tile = torch.zeros(block_k, d), torch.zeros(block_k, d)
            rows = min(block_k, n - j)
            k_tile[:rows], v_tile[:rows] = k.load(slice(j, j + block_k)), v.load(slice(j, j + block_k))
            s = tile @ k_tile.T / d**0.5
            column = torch.arange(j, j + block_k)
            s = s.masked_fill((column > torch.arange(i, i + len(tile))[:, None]) & (column < n), -torch.inf)
            new = torch.maximum(m, s.amax(1, keepdim=True))
            p, old = (s - new).exp(), (m - new).exp()
            l, acc, m = old * l + p.sum(1, keepdim=True), old * acc + p @ v_tile, new
        out.store(acc / l, slice(i, i + block_q))


def masked_after_softmax(q, k, v, out, block_q, block_k):
    n, d = q.shape
    for i in range(0, n, block_q):
        tile = q.load(slice(i, i + block_q))
        m, l, acc = torch.full((len(tile), 1), -torch.inf), torch.zeros(len(tile), 1), torch.zeros(len(tile), d)
        for j in range(0, n, block_k):
            s = tile @ k.load(slice(j, j + block_k)).T / d**0.5
            new = torch.maximum(m, s.amax(1, keepdim=True))
            p, old = (s - new).exp(), (m - new).exp()
            l = old * l + p.sum(1, keepdim=True)
            visible = torch.arange(j, j + s.shape[1]) <= torch.arange(i, i + len(s))[:, None]
            acc, m = old * acc + (p * visible) @ v.load(slice(j, j + block_k)), new
        out.store(acc / l, slice(i, i + block_q))


def one_m_for_a_tile(q, k, v, out, block_q, block_k):
    n, d = q.shape
    for i in range(0, n, block_q):
        tile = q.load(slice(i, i + block_q))
        m, l, acc = torch.tensor(-torch.inf), torch.zeros(len(tile), 1), torch.zeros(len(tile), d)
        for j in range(0, min(i + block_q, n), block_k):
            s = tile @ k.load(slice(j, j + block_k)).T / d**0.5
            s = s + torch.full_like(s, -torch.inf).triu(i - j + 1)
            new = torch.maximum(m, s.max())
            p, old = (s - new).exp(), (m - new).exp()
            l, acc, m = old * l + p.sum(1, keepdim=True), old * acc + p @ v.load(slice(j, j + block_k)), new
        out.store(acc / l, slice(i, i + block_q))


def divided_in_the_loop(q, k, v, out, block_q, block_k):
    n, d = q.shape
    for i in range(0, n, block_q):
        tile = q.load(slice(i, i + block_q))
        m, l, acc = torch.full((len(tile), 1), -torch.inf), torch.zeros(len(tile), 1), torch.zeros(len(tile), d)
        for j in range(0, min(i + block_q, n), block_k):
            s = tile @ k.load(slice(j, j + block_k)).T / d**0.5
            s = s + torch.full_like(s, -torch.inf).triu(i - j + 1)
            new = torch.maximum(m, s.amax(1, keepdim=True))
            p, old = (s - new).exp(), (m - new).exp()
            l, m = old * l + p.sum(1, keepdim=True), new
            acc = (old * acc + p @ v.load(slice(j, j + block_k))) / l
        out.store(acc, slice(i, i + block_q))


right = mask_on_the_diagonal_only
BEGINS = "        m, l, acc = torch.full((stop - i,), -torch.inf), torch.zeros(stop - i), torch.zeros(stop - i, d)\n"
LOOP = "        for j in range(0, stop, block_k):\n"
WRONG = [
    changed(right, "(i - j + 1)", "(1)", name="mask by the tile's own index", told="rows of the tile from 0"),
    Wrong("one m for a tile", one_m_for_a_tile, "m is one number for the whole tile"),
    changed(one_m_for_a_tile, "acc / l,", "acc / l.clamp(min=1e-30),", name="one m for a tile, NaN avoided",
            told="m is one number for the whole tile"),
    changed(right, "torch.exp(m - new)", "torch.exp(new - m if j else m - new)", name="factor upside down",
            told="the factor is upside down"),
    changed(right, "torch.exp(m - new)", "torch.exp(new - m)", name="factor upside down from −∞ on",
            told="the factor of the old sums exp(m − m_new)?"),
    Wrong("divided in the loop", divided_in_the_loop, "acc is divided by l inside the loop"),
    changed(divided_in_the_loop, "acc, slice", "acc / l, slice", name="divided in the loop and at the end",
            told="acc is divided by l inside the loop, and again"),
    changed(right, "k_tile.T", "(k_tile if k_tile.shape[0] == d else k_tile.T)", name="not transposed where d is block_k",
            told="k is not transposed"),
    changed(right, BEGINS + LOOP, LOOP + "    " + BEGINS, name="sums begin in the inner loop",
            told="m, l and acc begin once for a tile of queries"),
    changed(right, "p, old = torch.exp(s", "p, old = torch.exp2(s", name="base 2 for p alone", told="exponentials are in base 2"),
    changed(right, "old[:, None] * acc", "acc", name="acc not rescaled", told="acc is not rescaled"),
    changed(right, "old * l", "l", name="l not rescaled", told="l is not rescaled"),
    changed(right, "torch.exp(m - new)", "torch.ones_like(m)", name="nothing rescaled", told="nothing is rescaled"),
    changed(right, "torch.exp(", "torch.exp2(", name="base 2", told="base 2: multiply the scores"),
    changed(right, " * d**-0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(right, "d**-0.5", "d**-1", name="scaled twice", told="divided by d instead of √d"),
    changed(right, "acc / l[:, None]", "acc", name="not divided", told="not divided by l"),
    changed(by_merging, "s[torch.arange(j", "torch.empty_like(s)[torch.arange(j", name="no mask, tiles skipped",
            told="those on the diagonal are not masked"),
    changed(right, "(i - j + 1)", "(1)", name="mask as in the first tile", told="the mask on the diagonal counts rows"),
    changed(right, "(i - j + 1)", "(i - j + 2)", name="a key too many", told="off by one: each query sees one key too many"),
    changed(by_merging, "[None] > row", "[None] >= row", name="a key too few", told="the key at its own position"),
    changed(right, "range(0, stop, block_k)", "range(0, max(i, 1), block_k)", name="stops at the diagonal",
            told="the walk ends before the diagonal"),
    changed(right, "-torch.inf), torch.zeros(stop", "0.0), torch.zeros(stop", name="m starts at 0",
            told="m starts at −∞, not at 0"),
    changed(right, "torch.maximum(m, s.max(dim=1).values)", "s.max(dim=1).values", name="m of the tile alone",
            told="not of this tile alone"),
    changed(right, "range(0, n, block_q)", "range(0, n - block_q + 1, block_q)", name="last queries left out",
            told="was never stored"),
    changed(right, "out.store(acc / l[:, None], slice(i, stop))", "return acc / l[:, None]", name="nothing stored",
            told="nothing was stored"),
    Wrong("masked after the softmax", masked_after_softmax, "mask after the softmax"),
    Wrong("tail padded, not masked", padded, "padded and not masked"),
    Wrong("naive", naive, "a score matrix, or all keys, would not fit"),
    Wrong("only the queries tiled", a_row_of_keys, "or all keys, would not fit", kept=True),
    Wrong("half rows", in_columns, "load whole rows"),
    Wrong("naive, from copies of tiles", naive_from_copies, "of q and k moved", kept=True),
    Wrong("naive, with idle loads", naive_with_idle_loads, "the scores of all keys are in memory", kept=True),
    Wrong("a row of scores", a_row_of_scores, "the scores of all keys are in memory", kept=True),
    Wrong("all values kept", values_kept, "of v and out moved", kept=True),
    Wrong("keys outside", keys_outside, "make the tiles of queries the outer loop", kept=True),
    changed(right, "range(0, stop, block_k)", "range(0, n, block_k)", name="hidden tiles loaded",
            told="end the inner loop at the diagonal", kept=True),
    changed(right, "s = tile @ k_tile.T", "s = (q.load(slice(i, stop)) * d**-0.5) @ k_tile.T", name="q loaded in the inner loop",
            told="load a tile of queries before the loop", kept=True),
    changed(right, "            m = new", "            m = new; out.store(acc / l[:, None], slice(i, stop))", name="stored in the inner loop",
            told="out is stored more than once", kept=True),
]

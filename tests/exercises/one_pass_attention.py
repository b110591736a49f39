"""Answers to `one_pass_attention`."""

import torch

from tests.exercises.answers import Wrong, changed


def in_columns(q, k, v, block):
    """m, l and acc as (rows, 1) columns, the scale in q."""
    q = q / q.shape[1] ** 0.5
    m = q.new_full((len(q), 1), -torch.inf)
    l, acc = torch.zeros_like(m), torch.zeros_like(q)
    for j in range(0, k.shape[0], block):
        s = q @ k.load(slice(j, j + block)).T
        new = torch.maximum(m, s.max(1, keepdim=True).values)
        p = torch.exp(s - new)
        old = torch.exp(m - new)
        l = l * old + p.sum(1, keepdim=True)
        acc = acc * old + p @ v.load(slice(j, j + block))
        m = new
    return acc / l, (m + torch.log(l)).squeeze(1)


def by_merging(q, k, v, block):
    """Each block by itself, then merged: no running maximum is carried, only out and lse."""
    out, lse = torch.zeros_like(q), torch.full((len(q),), -torch.inf)
    for start in range(0, k.shape[0], block):
        rows = slice(start, min(start + block, k.shape[0]))
        scores = q @ k.load(rows).T * q.shape[1] ** -0.5
        block_lse = scores.logsumexp(-1)
        block_out = scores.softmax(-1) @ v.load(rows)
        both = torch.logaddexp(lse, block_lse)
        out = (lse - both).exp()[:, None] * out + (block_lse - both).exp()[:, None] * block_out
        lse = both
    return out, lse


def few_rows_at_a_time(q, k, v, block):
    """Four rows by themselves inside a block: many small calls, which may be."""
    m, l, acc = torch.full((len(q), 1), -torch.inf), torch.zeros(len(q), 1), torch.zeros_like(q)
    for j in range(0, k.shape[0], block):
        keys, values = k.load(slice(j, j + block)), v.load(slice(j, j + block))
        for i in range(0, len(q), 4):
            rows = slice(i, i + 4)
            s = q[rows] @ keys.T / q.shape[1] ** 0.5
            new = torch.maximum(m[rows], s.amax(1, keepdim=True))
            p, old = torch.exp(s - new), torch.exp(m[rows] - new)
            l[rows], acc[rows] = l[rows] * old + p.sum(1, keepdim=True), acc[rows] * old + p @ values
            m[rows] = new
    return acc / l, (m + l.log())[:, 0]


def with_exp2(q, k, v, block):
    """In base 2, and lse back in base e."""
    log2_e = 1.4426950408889634
    m, l, acc = torch.full((len(q), 1), -torch.inf), torch.zeros(len(q), 1), torch.zeros_like(q)
    for j in range(0, k.shape[0], block):
        s = q @ k.load(slice(j, j + block)).T * (log2_e / q.shape[1] ** 0.5)
        new = torch.maximum(m, s.amax(1, keepdim=True))
        p, old = torch.exp2(s - new), torch.exp2(m - new)
        l, acc, m = l * old + p.sum(1, keepdim=True), acc * old + p @ v.load(slice(j, j + block)), new
    return acc / l, ((m + torch.log2(l)) / log2_e)[:, 0]


RIGHT = {"columns": in_columns, "blocks merged": by_merging, "exp2": with_exp2, "few rows": few_rows_at_a_time}


def key_by_key(q, k, v, block):
    """Right, and hopelessly slow for many keys."""
    m, l, acc = torch.full((len(q),), -torch.inf), torch.zeros(len(q)), torch.zeros_like(q)
    for j in range(k.shape[0]):
        s = q @ k.load(slice(j, j + 1))[0] / q.shape[1] ** 0.5
        new = torch.maximum(m, s)
        p, old = torch.exp(s - new), torch.exp(m - new)
        l, acc, m = l * old + p, acc * old[:, None] + p[:, None] * v.load(slice(j, j + 1)), new
    return acc / l[:, None], m + l.log()


def padded(q, k, v, block):
    """As on a GPU, where a block always has its full size; the padding is not masked."""
    m, l, acc = torch.full((len(q), 1), -torch.inf), torch.zeros(len(q), 1), torch.zeros_like(q)
    for j in range(0, k.shape[0], block):
        rows = slice(j, j + block)
        full = lambda x: torch.nn.functional.pad(x, (0, 0, 0, block - len(x)))  # noqa: E731
        s = q @ full(k.load(rows)).T / q.shape[1] ** 0.5
        new = torch.maximum(m, s.amax(1, keepdim=True))
        p, old = torch.exp(s - new), torch.exp(m - new)
        l, acc, m = l * old + p.sum(1, keepdim=True), acc * old + p @ full(v.load(rows)), new
    return acc / l, (m + torch.log(l))[:, 0]


def scores_collected(q, k, v, block):
    starts = range(0, k.shape[0], block)
    scores = torch.cat([q @ k.load(slice(j, j + block)).T for j in starts], dim=1) / q.shape[1] ** 0.5
    p = scores.softmax(-1)
    return sum(p[:, j : j + block] @ v.load(slice(j, j + block)) for j in starts), scores.logsumexp(-1)


def copies_kept(q, k, v, block):
    """Reads each key once, and then has all of them for as many passes as it likes."""
    copy = lambda x: torch.cat([x.load(slice(j, j + block)).clone() for j in range(0, x.shape[0], block)])  # noqa: E731
    keys, values = copy(k), copy(v)
    outs, lses = zip(*(whole(row[None], keys, values) for row in q), strict=True)
    return torch.cat(outs), torch.cat(lses)


def whole(q, k, v):
    scores = q @ k.T / q.shape[1] ** 0.5
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def all_at_once(q, k, v, block):
    return whole(q, k.load(slice(None)), v.load(slice(None)))


def in_two_passes(q, k, v, block):
    """The largest score first, then the sums: nothing is ever rescaled."""
    parts = [slice(j, j + block) for j in range(0, k.shape[0], block)]
    score = lambda rows: q @ k.load(rows).T / q.shape[1] ** 0.5  # noqa: E731
    m = torch.stack([score(rows).amax(-1) for rows in parts]).amax(0)
    l, acc = torch.zeros(len(q)), torch.zeros_like(q)
    for rows in parts:
        p = (score(rows) - m[:, None]).exp()
        l, acc = l + p.sum(-1), acc + p @ v.load(rows)
    return acc / l[:, None], m + l.log()


def half_of_the_rows(q, k, v, block):
    """Half of the queries, and then the other: fewer scores at a time, and all keys once more."""
    outs, lses = zip(*(in_columns(half, k, v, block) for half in q.tensor_split(2) if len(half)), strict=True)
    return torch.cat(outs), torch.cat(lses)


def no_maximum(q, k, v, block):
    l, acc = torch.zeros(len(q), 1), torch.zeros_like(q)
    for j in range(0, k.shape[0], block):
        p = (q @ k.load(slice(j, j + block)).T / q.shape[1] ** 0.5).exp()
        l, acc = l + p.sum(1, keepdim=True), acc + p @ v.load(slice(j, j + block))
    return acc / l, l.log()[:, 0]


def blocks_averaged(q, k, v, block):
    rows = [slice(j, j + block) for j in range(0, k.shape[0], block)]
    outs, lses = zip(*(whole(q, k.load(part), v.load(part)) for part in rows), strict=True)
    return torch.stack(outs).mean(0), torch.stack(lses).logsumexp(0)


WRONG = [
    changed(in_columns, "acc * old", "acc", name="acc not rescaled", told="acc is not rescaled"),
    changed(in_columns, "l * old", "l", name="l not rescaled", told="l is not rescaled"),
    changed(in_columns, "old = torch.exp(m - new)", "old = 1", name="nothing rescaled", told="nothing is rescaled"),
    changed(in_columns, "torch.exp(m - new)", "torch.exp(new - m)", name="rescale upside down", told="exp(m − m_new)"),
    changed(in_columns, "torch.exp(", "torch.exp2(", name="base 2", told="base 2: multiply the scores"),
    changed(in_columns, "torch.log(l)", "torch.log2(l)", name="log2 of l", told="log2"),
    changed(
        by_merging, "return out, lse", "return out, lse / 0.6931472", name="lse in base 2", told="lse is in base 2"
    ),
    changed(in_columns, "m + torch.log(l)", "torch.log(l)", name="lse without m", told="lse lacks the largest score"),
    changed(in_columns, "m + torch.log(l)", "m", name="lse is m", told="lse is the largest score alone"),
    changed(in_columns, "(m + torch.log(l))", "l", name="lse is l", told="lse is l, and not its logarithm"),
    changed(in_columns, ".squeeze(1)", "", name="lse as a column", told="lse has shape (5, 1), expected (5,)"),
    changed(in_columns, "acc / l,", "acc,", name="not divided", told="not divided by l"),
    changed(in_columns, " / q.shape[1] ** 0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(in_columns, "q.shape[1] ** 0.5", "q.shape[1]", name="scaled twice", told="divided by d instead of √d"),
    changed(
        in_columns,
        "range(0, k.shape[0], block)",
        "range(0, k.shape[0] - block + 1, block)",
        name="tail dropped",
        told="the last keys are missing",
    ),
    changed(in_columns, "-torch.inf", "0.0", name="m starts at 0", told="m starts at −∞, not at 0"),
    changed(
        in_columns, "-torch.inf", "-1e4", name="m starts at -10000", told="m starts at −∞, not at 0, nor at another"
    ),
    changed(
        in_columns,
        "s.max(1, keepdim=True).values",
        "s.max()",
        name="one m for all rows",
        told="m is one number for all rows",
    ),
    changed(
        in_columns,
        "torch.maximum(m, s.max(1, keepdim=True).values)",
        "s.max(1, keepdim=True).values",
        name="m of the block alone",
        told="out is NaN",
    ),
    changed(with_exp2, "1.4426950408889634", "1.0", name="base 2 throughout", told="all is in base 2, lse too"),
    changed(
        in_columns,
        "        m = new",
        "        acc = acc / l\n        m = new",
        name="divided in each block",
        told="divided by l in every block",
    ),
    changed(
        in_columns,
        "        m = new\n    return acc / l",
        "        acc = acc / l\n        m = new\n    return acc",
        name="divided in each block only",
        told="divided by l in every block",
    ),
    changed(
        in_columns,
        "return acc / l, (m + torch.log(l)).squeeze(1)",
        "return acc / l",
        name="no lse",
        told="expected 2: out, lse",
    ),
    Wrong("tail padded, not masked", padded, "padded and not masked"),
    Wrong("no largest score", no_maximum, "exp overflows: subtract the largest score so far"),
    Wrong("blocks averaged", blocks_averaged, "plain average of the blocks"),
    Wrong("all keys at once", all_at_once, "a score matrix, or all keys, would not fit"),
    Wrong("scores collected", scores_collected, "the scores, or copies, of all keys are in memory", kept=True),
    Wrong("copies kept", copies_kept, "the scores, or copies, of all keys are in memory", kept=True),
    Wrong("key by key", key_by_key, "work on whole blocks: it calls torch more than 200,000 times", kept=True),
    Wrong("two passes", in_two_passes, "it reads k and v 1.5 times", kept=True),
    Wrong("half of the rows at a time", half_of_the_rows, "it reads k and v 2.0 times", kept=True),
]

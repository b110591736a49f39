"""Answers to `gqa_attention`."""

import torch

from tests.exercises.answers import Wrong, changed


def head_by_head(q, k, v):
    (batch, sq, h, d), sk, hk = q.shape, k.shape[1], k.shape[2]
    out, lse = torch.zeros_like(q), q.new_full((batch, h, sq), -torch.inf)
    first = max(0, sq - sk)  # the queries before it see no key
    position = torch.arange(sq)[:, None] + sk - sq
    future = torch.arange(sk) > position
    for b in range(batch):
        for head in range(h):
            kv_head = head // (h // hk)
            scores = q[b, :, head] @ k[b, :, kv_head].T / d**0.5
            scores[future] = float("-inf")
            out[b, first:, head] = scores[first:].softmax(-1) @ v[b, :, kv_head]
            lse[b, head] = scores.logsumexp(-1)
    return out, lse


def grouped_einsum(q, k, v):
    sq, sk, hk = q.shape[1], k.shape[1], k.shape[2]
    grouped = q.unflatten(2, (hk, -1))  # (batch, sq, hk, group, d)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k) * q.shape[-1] ** -0.5
    scores = scores + torch.full((sq, sk), -torch.inf).triu(sk - sq + 1)
    m = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - m).exp()
    l = weights.sum(-1, keepdim=True)
    weights = weights / l.clamp(min=1e-30)
    lse = (m + l.log()).squeeze(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v).flatten(2, 3), lse.flatten(1, 2)


def finite_fill(q, k, v):
    sq, sk = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    visible = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).where(visible, -1e30)
    some = visible.any(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v) * some[:, None, None]
    return out, scores.logsumexp(-1).where(some, -torch.inf)


def in_float64(q, k, v):
    wide = [x.double().transpose(1, 2) for x in (q, k, v)]
    queries, keys, values = wide[0], *(x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in wide[1:])
    scores = queries @ keys.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones_like(scores).tril(k.shape[1] - q.shape[1]) == 0, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(scores == -torch.inf, 0, (scores - lse).exp())
    return (weights @ values).transpose(1, 2).float(), lse[..., 0].float()


def query_by_query(q, k, v):
    (batch, sq, h, d), sk, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    out, lse = [], []
    for i in range(sq):
        stop = max(0, i + sk - sq + 1)
        keys, values = (x[:, :stop].repeat_interleave(group, 2) for x in (k, v))
        scores = (q[:, i, None] * keys).sum(-1) / d**0.5  # (batch, stop, h)
        out.append((scores.softmax(1)[..., None] * values).sum(1))
        lse.append(scores.logsumexp(1) if stop else q.new_full((batch, h), -torch.inf))
    return torch.stack(out, 1), torch.stack(lse, -1)


RIGHT = {
    "head by head": head_by_head,
    "grouped einsum": grouped_einsum,
    "a finite fill, and what sees no key apart": finite_fill,
    "in float64": in_float64,
    "query by query, over the visible keys": query_by_query,
}


def with_softmax(q, k, v):
    sq, sk = q.shape[1], k.shape[1]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    visible = torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    scores = scores.masked_fill(~visible, -torch.inf)
    p = scores.softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", p, v), scores.logsumexp(-1)


RIGHT["softmax, and its NaN replaced"] = with_softmax


def mask_after_softmax(q, k, v):
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5)
    p = scores.softmax(-1) * torch.ones(sq, sk).tril(sk - sq)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), scores.logsumexp(-1)


def renormalised(q, k, v):
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5)
    p = scores.softmax(-1) * torch.ones(sq, sk).tril(sk - sq)
    l = p.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", (p / l).nan_to_num(), v)
    return out, scores.logsumexp(-1) + l[..., 0].log()


def largest_of_all(q, k, v):
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5)
    m = scores.amax(-1, keepdim=True)
    p = (scores - m).exp() * torch.ones(sq, sk).tril(sk - sq)
    l = p.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", p / l.masked_fill(l == 0, 1), v)
    return out, (m + l.log())[..., 0]


def reshaped(q, k, v):
    (batch, sq, h, d), sk = q.shape, k.shape[1]
    k, v = (x.repeat_interleave(h // k.shape[2], dim=2).reshape(batch, h, sk, d) for x in (k, v))
    scores = q.reshape(batch, h, sq, d) @ k.transpose(-1, -2) / d**0.5
    hidden = torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).reshape(q.shape), scores.logsumexp(-1)


def overwritten(q, k, v):
    q /= q.shape[-1] ** 0.5
    return with_softmax(q * q.shape[-1] ** 0.5, k, v)


def overwritten_k(q, k, v):
    k[:] = k * q.shape[-1] ** -0.5
    return with_softmax(q * q.shape[-1] ** 0.5, k, v)


def pytorchs_own(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2), q[..., 0]


def the_librarys(q, k, v):
    from minillm.attention import naive_attention

    return naive_attention(q, k, v, causal=True, return_lse=True)


def never_returned(q, k, v):
    grouped_einsum(q, k, v)


def without_lse(q, k, v):
    return grouped_einsum(q, k, v)[0]


def heads_first(q, k, v):
    out, lse = grouped_einsum(q, k, v)
    return out.transpose(1, 2), lse


def lse_by_query(q, k, v):
    out, lse = grouped_einsum(q, k, v)
    return out, lse.transpose(1, 2)


def heads_not_repeated(q, k, v):
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2), scores.logsumexp(-1)


def plus_infinity(q, k, v):
    out, lse = with_softmax(q, k, v)
    return out, lse.where(lse > -torch.inf, torch.inf)


def zero_lse(q, k, v):
    out, lse = with_softmax(q, k, v)
    return out, lse.where(lse > -torch.inf, 0)


def infinities_replaced(q, k, v):
    out, lse = with_softmax(q, k, v)
    return out, lse.nan_to_num()


LSE = "scores.logsumexp(-1)"
WRONG = [
    changed(head_by_head, " + sk - sq", "", name="the mask starts top left", told="top-left aligned: query 0 of"),
    changed(head_by_head, "scores[future]", "scores[future & False]", name="no mask", told="no causal mask"),
    changed(head_by_head, "> position", "> position + 1", name="a key too many", told="one key too many"),
    changed(head_by_head, "> position", ">= position", name="a key too few", told="the key at its own position"),
    changed(head_by_head, 'float("-inf")', "0", name="hidden scores are 0", told="0 and not −∞"),
    changed(head_by_head, 'float("-inf")', "-100", name="hidden scores are -100", told="is -100 and not −∞"),
    changed(with_softmax, "-torch.inf", "-1e9", name="hidden scores are -1e9", told="is -1e+09 and not −∞"),
    Wrong("masked after the softmax", mask_after_softmax, "mask after the softmax"),
    Wrong("masked after the softmax and divided by the sum", renormalised, "the visible keys are left with 0"),
    changed(
        renormalised, ".nan_to_num()", "", name="divided by the sum, and NaN", told="the visible keys are left with 0"
    ),
    Wrong("the largest of all keys is subtracted", largest_of_all, "the visible keys are left with 0"),
    changed(head_by_head, "head // (h // hk)", "head % hk", name="heads interleaved", told="interleaved"),
    changed(head_by_head, "head // (h // hk)", "0", name="all heads read KV head 0", told="read the first KV head"),
    changed(head_by_head, "@ v[b, :, kv_head]", "@ v[b, :, head % hk]", name="v interleaved", told="heads of v are"),
    changed(head_by_head, " / d**0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(head_by_head, "d**0.5", "d", name="scaled twice", told="divided by d instead of √d"),
    changed(with_softmax, "softmax(-1)", "softmax(-2)", name="softmax over the queries", told="runs over the queries"),
    changed(with_softmax, "softmax(-1)", "softmax(1)", name="softmax over the heads", told="runs over the heads"),
    changed(head_by_head, "> position", "< position", name="upside down", told="tril, not triu"),
    changed(with_softmax, "~visible", "visible", name="inverted", told="your mask is inverted"),
    changed(
        with_softmax, "tril(sk - sq)", "tril(sq - sk)", name="the diagonal's sign turned", told="has the wrong sign"
    ),
    changed(
        with_softmax,
        "tril(sk - sq)\n    scores = scores.masked_fill(~visible, -torch.inf)\n    p = scores.softmax(-1).nan_to_num",
        "tril(sq - sk)\n    scores = scores.masked_fill(~visible, -torch.inf)\n    p = scores.softmax(-1).clone",
        name="the sign turned, and NaN",
        told="query 0 of 1 must see 9 of 9. Is the diagonal sk − sq, with this sign?",
    ),
    changed(
        with_softmax,
        ".nan_to_num()",
        "",
        name="NaN without a key",
        told="query 0 of 6 must see no key: its out is 0, its lse −∞",
    ),
    changed(
        grouped_einsum,
        "amax(-1, keepdim=True).clamp(min=-1e30)",
        "new_zeros(1)",
        name="exp overflows",
        told="subtract the largest",
    ),
    changed(grouped_einsum, ".clamp(min=-1e30)", ".clamp(min=0)", name="m starts at 0", told="subtract the largest"),
    changed(grouped_einsum, ".clamp(min=-1e30)", "", name="-inf minus -inf", told="−∞ − (−∞) and 0 / 0 are NaN too"),
    Wrong("reshaped", reshaped, "reshape does not swap axes"),
    changed(
        reshaped, ".reshape(q.shape)", ".transpose(1, 2)", name="reshaped on the way in", told="reshape does not swap"
    ),
    Wrong("q overwritten", overwritten, "q itself was changed"),
    Wrong("k overwritten", overwritten_k, "k itself was changed"),
    changed(with_softmax, LSE, "scores.exp().sum(-1).log()", name="lse overflows", told="m + log l is safe"),
    changed(with_softmax, LSE, f"{LSE} / math.log(2)", name="lse in base 2", told="lse is in base 2"),
    changed(with_softmax, LSE, "scores.amax(-1)", name="lse is the largest", told="the largest score alone"),
    changed(
        with_softmax,
        LSE,
        "(scores - scores.amax(-1, keepdim=True)).logsumexp(-1)",
        name="lse less the largest",
        told="lse lacks the largest",
    ),
    changed(
        with_softmax, LSE, "scores.exp().sum(-1)", name="lse without the log", told="lse is the sum of exp, and not"
    ),
    changed(with_softmax, LSE, "(scores * q.shape[-1] ** 0.5).logsumexp(-1)", name="lse unscaled", told="without 1/√d"),
    changed(
        with_softmax,
        "scores = scores.masked_fill(~visible, -torch.inf)\n    p = scores.softmax",
        "p = scores.masked_fill(~visible, -torch.inf).softmax",
        name="lse over all keys",
        told="lse runs over the hidden keys",
    ),
    Wrong(
        "lse is +inf without a key",
        plus_infinity,
        "lse is inf at batch 0, head 0, query 0, expected -inf queries 0 and 1 stand before the first key",
    ),
    Wrong("lse is 0 without a key", zero_lse, "lse of a query that sees no key must be −∞, not 0"),
    Wrong("lse by nan_to_num", infinities_replaced, "nan_to_num has turned the −∞"),
    Wrong("PyTorch's attention", pytorchs_own, "calls scaled_dot_product_attention"),
    Wrong("the library's attention", the_librarys, "calls the library's attention"),
    Wrong("no return", never_returned, "is there a `return`?"),
    Wrong("no lse", without_lse, "1 results, expected 2: out, lse"),
    Wrong("heads before queries", heads_first, "expected (2, 5, 1, 16): (batch, query, head, dim)"),
    Wrong("lse with queries before heads", lse_by_query, "lse has shape (2, 5, 1), expected (2, 1, 5)"),
    Wrong("KV heads not repeated", heads_not_repeated, "RuntimeError"),
]

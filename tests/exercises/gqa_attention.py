"""Answers to `gqa_attention`."""

import torch

from tests.exercises.answers import Wrong, changed


def head_by_head(q, k, v):
    (batch, sq, h, d), sk, hk = q.shape, k.shape[1], k.shape[2]
    out = torch.empty_like(q)
    position = torch.arange(sq)[:, None] + sk - sq
    future = torch.arange(sk) > position
    for b in range(batch):
        for head in range(h):
            kv_head = head // (h // hk)
            scores = q[b, :, head] @ k[b, :, kv_head].T / d**0.5
            scores[future] = float("-inf")
            out[b, :, head] = scores.softmax(-1) @ v[b, :, kv_head]
    return out


def grouped_einsum(q, k, v):
    sq, sk, hk = q.shape[1], k.shape[1], k.shape[2]
    grouped = q.unflatten(2, (hk, -1))  # (batch, sq, hk, group, d)
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k) * q.shape[-1] ** -0.5
    scores = scores + torch.full((sq, sk), -torch.inf).triu(sk - sq + 1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v).flatten(2, 3)


RIGHT = {"head by head": head_by_head, "grouped einsum": grouped_einsum}


def mask_after_softmax(q, k, v):
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    p = torch.einsum("bqhd,bkhd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    p = p * torch.ones(sq, sk).tril(sk - sq)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


def reshaped(q, k, v):
    (batch, sq, h, d), sk = q.shape, k.shape[1]
    k, v = (x.repeat_interleave(h // k.shape[2], dim=2).reshape(batch, h, sk, d) for x in (k, v))
    scores = q.reshape(batch, h, sq, d) @ k.transpose(-1, -2) / d**0.5
    hidden = torch.ones(sq, sk, dtype=torch.bool).triu(sk - sq + 1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).reshape(q.shape)


def pytorchs_own(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def the_librarys(q, k, v):
    from minillm.attention import naive_attention

    return naive_attention(q, k, v, causal=True)


def never_returned(q, k, v):
    grouped_einsum(q, k, v)


def heads_first(q, k, v):
    return grouped_einsum(q, k, v).transpose(1, 2)


def heads_not_repeated(q, k, v):
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


WRONG = [
    changed(head_by_head, " + sk - sq", "", name="the mask starts top left", told="top-left aligned: query 0 of"),
    changed(head_by_head, "scores[future]", "scores[future & False]", name="no mask", told="no causal mask"),
    changed(head_by_head, "> position", "> position + 1", name="a key too many", told="one key too many"),
    changed(head_by_head, "> position", ">= position", name="a key too few", told="the key at its own position"),
    changed(head_by_head, 'float("-inf")', "0", name="hidden scores are 0", told="0 and not −∞"),
    Wrong("masked after the softmax", mask_after_softmax, "mask after the softmax"),
    changed(head_by_head, "head // (h // hk)", "head % hk", name="heads interleaved", told="interleaved"),
    changed(head_by_head, "head // (h // hk)", "0", name="all heads read KV head 0", told="read the first KV head"),
    changed(head_by_head, " / d**0.5", "", name="no scale", told="1/√d is forgotten"),
    changed(head_by_head, "d**0.5", "d", name="scaled twice", told="divided by d instead of √d"),
    changed(head_by_head, "softmax(-1)", "softmax(0).nan_to_num()", name="softmax over the queries", told="over the keys"),
    changed(grouped_einsum, " - scores.amax(-1, keepdim=True)", "", name="exp overflows", told="subtract the largest"),
    changed(head_by_head, "> position", "< position", name="upside down", told="tril, not triu"),
    Wrong("reshaped", reshaped, "reshape does not swap axes"),
    changed(reshaped, ".reshape(q.shape)", ".transpose(1, 2)", name="reshaped on the way in", told="reshape does not swap axes"),
    Wrong("PyTorch's attention", pytorchs_own, "calls scaled_dot_product_attention"),
    Wrong("the library's attention", the_librarys, "calls the library's attention"),
    Wrong("no return", never_returned, "is there a `return`?"),
    Wrong("heads before queries", heads_first, "expected (2, 5, 1, 16): (batch, query, head, dim)"),
    Wrong("KV heads not repeated", heads_not_repeated, "RuntimeError"),
]

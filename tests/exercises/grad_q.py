"""Answers to `grad_q`."""

import torch

from tests.exercises.answers import Wrong, changed


def keys_outside(q, k, v, out, lse, grad_out, block_q, block_k):
    """The other order of the loops, the scale in q, lse and delta as rows of their own."""
    n, scale = len(q), q.shape[1] ** -0.5
    delta = torch.einsum("nd,nd->n", grad_out, out)
    result = torch.zeros(q.shape)
    position = torch.arange(n)
    for j in range(0, n, block_k):
        keys, values = k[j : j + block_k], v[j : j + block_k]
        for i in range(j // block_q * block_q, n, block_q):
            s = (q[i : i + block_q] * scale) @ keys.T
            future = position[j : j + block_k] > position[i : i + block_q, None]
            p = torch.exp(s.masked_fill(future, -torch.inf) - lse[i : i + block_q, None])
            dp = grad_out[i : i + block_q] @ values.T
            ds = p * (dp - delta[i : i + block_q, None])
            result[i : i + block_q] += scale * ds @ keys
    return result


def two_sums(q, k, v, out, lse, grad_out, block_q, block_k):
    """Σ P ∘ dP K and Σ P K apart, tile by tile, and δ at the end: scores as (keys, queries)."""
    n, d = q.shape
    result = []
    for i in range(0, n, block_q):
        rows = slice(i, min(i + block_q, n))
        weighted, plain = torch.zeros(rows.stop - i, d), torch.zeros(rows.stop - i, d)
        for j in range(0, rows.stop, block_k):
            keys = slice(j, min(j + block_k, rows.stop))
            s = k[keys] @ (q[rows] / d**0.5).T
            s = s.masked_fill(torch.arange(j, keys.stop)[:, None] > torch.arange(i, rows.stop), -torch.inf)
            p = torch.exp(s - lse[rows])
            weighted += (p * (v[keys] @ grad_out[rows].T)).T @ k[keys]
            plain += p.T @ k[keys]
        delta = (out[rows] * grad_out[rows]).sum(1, keepdim=True)
        result.append((weighted - delta * plain) / d**0.5)
    return torch.cat(result)


RIGHT = {"keys outside": keys_outside, "two sums, delta last": two_sums}


def autograd_by_tile(q, k, v, out, lse, grad_out, block_q, block_k):
    """Autograd through the softmax of one tile of queries at a time: out and lse are not needed."""
    n = len(q)
    grads = []
    for i in range(0, n, block_q):
        tile = q[i : i + block_q].clone().requires_grad_()
        s = tile @ k[: i + block_q].T / q.shape[1] ** 0.5
        s = s + torch.full(s.shape, -torch.inf).triu(i + 1)
        grads.append(torch.autograd.grad(s.softmax(-1) @ v[: i + block_q], tile, grad_out[i : i + block_q])[0])
    return torch.cat(grads)


def autograd_by_the_saved_lse(q, k, v, out, lse, grad_out, block_q, block_k):
    """Tile by tile, and right: only that autograd does the work."""
    n, scale = len(q), q.shape[1] ** -0.5
    delta, result = (grad_out * out).sum(-1, keepdim=True), torch.zeros_like(q)
    for i in range(0, n, block_q):
        for j in range(0, min(i + block_q, n), block_k):
            rows, keys = slice(i, i + block_q), slice(j, j + block_k)
            tile = q[rows].clone()
            tile.requires_grad = True
            hidden = torch.arange(n)[keys] > torch.arange(n)[rows, None]
            p = ((tile @ k[keys].T * scale).masked_fill(hidden, -torch.inf) - lse[rows, None]).exp()
            (p * (grad_out[rows] @ v[keys].T - delta[rows])).sum().backward()
            result[rows] += tile.grad
    return result


def functional_autograd(q, k, v, out, lse, grad_out, block_q, block_k):
    def attend(q):
        s = q @ k.T / q.shape[1] ** 0.5
        return (s + torch.full_like(s, -torch.inf).triu(1)).softmax(-1) @ v

    return torch.func.vjp(attend, q)[1](grad_out)[0]


def strips_of_keys(q, k, v, out, lse, grad_out, block_q, block_k):
    """A tile of queries and all of its keys at a time."""
    n, scale = len(q), q.shape[1] ** -0.5
    result = torch.zeros_like(q)
    for i in range(0, n, block_q):
        rows, keys = slice(i, i + block_q), slice(0, i + block_q)
        p = (q[rows] @ k[keys].T * scale - lse[rows, None]).exp().tril(i)
        ds = p * (grad_out[rows] @ v[keys].T - (grad_out[rows] * out[rows]).sum(-1, keepdim=True))
        result[rows] = ds @ k[keys] * scale
    return result


def strips_of_queries(q, k, v, out, lse, grad_out, block_q, block_k):
    """A tile of keys and all queries at a time."""
    n, scale = len(q), q.shape[1] ** -0.5
    delta, result = (grad_out * out).sum(-1, keepdim=True), torch.zeros_like(q)
    for j in range(0, n, block_k):
        keys = slice(j, j + block_k)
        p = (q @ k[keys].T * scale - lse[:, None]).masked_fill(torch.arange(n)[keys] > torch.arange(n)[:, None], -torch.inf)
        result += p.exp() * (grad_out @ v[keys].T - delta) @ k[keys] * scale
    return result


def softmax_of_the_strip(q, k, v, out, lse, grad_out, block_q, block_k):
    """The softmax computed again, without autograd: neither lse nor out is used."""
    n, scale = len(q), q.shape[1] ** -0.5
    result = torch.zeros_like(q)
    for i in range(0, n, block_q):
        rows, keys = slice(i, i + block_q), slice(0, i + block_q)
        s = q[rows] @ k[keys].T * scale
        p = (s + torch.full_like(s, -torch.inf).triu(i + 1)).softmax(-1)
        dp = grad_out[rows] @ v[keys].T
        result[rows] = p * (dp - (p * dp).sum(-1, keepdim=True)) @ k[keys] * scale
    return result


def materialised(q, k, v, out, lse, grad_out, block_q, block_k):
    scale = q.shape[1] ** -0.5
    p = (q @ k.T * scale - lse[:, None]).exp().tril()
    ds = p * (grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True))
    return ds @ k * scale


def through_autograd(q, k, v, out, lse, grad_out, block_q, block_k):
    q = q.requires_grad_()
    s = (q @ k.T / q.shape[1] ** 0.5).masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
    return torch.autograd.grad(s.softmax(-1) @ v, q, grad_out)[0]


def softmax_of_the_tile(q, k, v, out, lse, grad_out, block_q, block_k):
    """A softmax over the keys of each tile, as if they were all."""
    n, scale = len(q), q.shape[1] ** -0.5
    delta, result = (grad_out * out).sum(-1, keepdim=True), torch.zeros_like(q)
    for i in range(0, n, block_q):
        for j in range(0, min(i + block_q, n), block_k):
            rows, keys = slice(i, i + block_q), slice(j, j + block_k)
            s = q[rows] @ k[keys].T * scale
            s = s.masked_fill(torch.arange(n)[keys] > torch.arange(n)[rows, None], -torch.inf)
            p = s.softmax(-1).nan_to_num(0)
            result[rows] += p * (grad_out[rows] @ v[keys].T - delta[rows]) @ k[keys] * scale
    return result


def gradient_of_k(q, k, v, out, lse, grad_out, block_q, block_k):
    scale = q.shape[1] ** -0.5
    p = (q @ k.T * scale - lse[:, None]).exp().tril()
    ds = p * (grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True))
    return ds.T @ q * scale


WRONG = [
    changed(keys_outside, "(dp - delta[i : i + block_q, None])", "dp", name="no delta", told="δ is forgotten"),
    changed(keys_outside, "dp - delta", "dp + delta", name="delta added", told="δ is added"),
    changed(keys_outside, "delta[i : i + block_q, None]", "delta.mean()", name="one delta for all, the mean",
            told="δ is one number for all rows"),
    changed(keys_outside, "delta[i : i + block_q, None]", "delta.sum()", name="one delta for all", told="δ is one number for all rows"),
    changed(keys_outside, "delta = torch", "delta = 1 / q.shape[1] * torch", name="delta a mean", told="δ is the mean"),
    changed(keys_outside, "delta[i : i + block_q, None]", "(p * dp).sum(-1, keepdim=True)", name="delta of one tile",
            told="δ is the sum over one tile of keys"),
    changed(keys_outside, "scale * ds @", "scale * (ds.T if len(ds) == len(keys) else ds) @", name="dS transposed",
            told="dS is transposed in each tile"),
    changed(keys_outside, "+= scale", "-= scale", name="sign turned", told="the sign is turned"),
    Wrong("softmax computed again", softmax_of_the_strip, "P and δ are those of a softmax over the keys at hand"),
    changed(softmax_of_the_strip, "(p * dp)", "(grad_out[rows] * out[rows])", name="softmax computed again, delta from out",
            told="P is a softmax over the keys at hand"),
    changed(strips_of_keys, "(grad_out[rows] * out[rows]).sum(", "(p * (grad_out[rows] @ v[keys].T)).sum(",
            name="delta of the keys at hand", told="δ is a sum over the keys at hand"),
    Wrong("autograd by tile", autograd_by_tile, "it calls autograd"),
    Wrong("autograd with the saved lse", autograd_by_the_saved_lse, "it calls autograd"),
    Wrong("torch.func", functional_autograd, "it calls autograd"),
    Wrong("autograd through all", through_autograd, "it calls autograd"),
    Wrong("strips of keys", strips_of_keys, "not with a strip across all 4096 keys or queries (16 MiB)", kept=True),
    Wrong("strips of queries", strips_of_queries, "not with a strip across all 4096 keys or queries (16 MiB)", kept=True),
    changed(keys_outside, "scale * ds", "ds", name="no scale", told="the scale is forgotten"),
    changed(keys_outside, "scale * ds", "scale * scale * ds", name="scaled twice", told="the scale is there twice"),
    changed(keys_outside, "s.masked_fill(future, -torch.inf)", "s", name="mask missing on the diagonal",
            told="those on the diagonal are not masked"),
    changed(keys_outside, "> position[i", ">= position[i", name="a key too few", told="the key at its own position"),
    changed(keys_outside, "> position[i", "> 1 + position[i", name="a key too many", told="one key too many"),
    changed(keys_outside, "p * (", "(", name="P left out", told="P is missing"),
    changed(keys_outside, "torch.exp(", "torch.exp2(", name="base 2", told="base 2"),
    changed(keys_outside, " - lse[i : i + block_q, None])", ")", name="lse not used", told="the probabilities are not normalised"),
    changed(keys_outside, "+= scale", "= scale", name="only the last tile", told="only one tile of keys counts"),
    changed(keys_outside, "range(0, n, block_k)", "range(0, n - block_k + 1, block_k)", name="last keys left out",
            told="the last keys are missing"),
    Wrong("softmax of each tile", softmax_of_the_tile, "a softmax over each tile of keys"),
    Wrong("the gradient of k", gradient_of_k, "this is dK"),
    Wrong("P materialised", materialised, "or the probabilities of the whole sequence (64 MiB)", kept=True),
]

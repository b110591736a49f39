"""Attention as a function: grouped heads, a back end that says why it runs, and two halves of the keys merged."""

import torch

from minillm.attention import attention, choose_backend, merge_state

torch.manual_seed(0)
q = torch.randn(1, 5, 8, 64)  # (batch, seqlen_q, nheads, headdim), as in flash-attn
k, v = torch.randn(2, 1, 12, 2, 64)  # (batch, seqlen_k, nheads_k, headdim): four query heads on each KV head

# Bottom-right aligned: the last query sees all 12 keys, the first one 8 of them.
out = attention(q, k, v, causal=True)
print("out", tuple(out.shape), "by", choose_backend(q, k, v, causal=True))

# With the log-sum-exp of each row's scores, (batch, nheads, seqlen_q), results over parts of the keys can be merged.
out, lse = attention(q, k, v, return_lse=True)
print("lse", tuple(lse.shape), "by", choose_backend(q, k, v, return_lse=True))

first = attention(q, k[:, :7], v[:, :7], return_lse=True)
second = attention(q, k[:, 7:], v[:, 7:], return_lse=True)
merged, merged_lse = merge_state(*first, *second)
print(f"keys 0 to 6 merged with keys 7 to 11: {(merged - out).abs().max():.0e} away from attention over all 12")

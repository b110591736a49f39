"""Attacks on what is judged beside the result: traffic, memory, and the work that Triton's interpreter counts."""

from __future__ import annotations

from tests.grading.attacks import Attack

ON_COUNTS = {
    "loads-everything": Attack(
        "loads all of K and V at once",
        answer="""
            def flash_forward(q, k, v, out, block_q, block_k):
                whole = slice(None)
                queries, keys, values = q.load(whole), k.load(whole), v.load(whole)
                scores = queries @ keys.T / q.shape[1] ** 0.5
                later = torch.ones_like(scores).triu(1).bool()
                out.store(scores.masked_fill(later, -torch.inf).softmax(-1) @ values, whole)
        """,
        says="need more than sram",
    ),
    "row-of-scores": Attack(
        "the plain softmax over a row of tiles, in a buffer that was made before",
        answer="""
            BUFFER = torch.ones(4000 * 8500)
            def flash_forward(q, k, v, out, block_q, block_k):
                n, d = q.shape
                for i in range(0, n, block_q):
                    tile, last = q.load(slice(i, i + block_q)) / d**0.5, min(i + block_q, n)
                    s = BUFFER[: len(tile) * last].view(len(tile), last)
                    for j in range(0, last, block_k):
                        keys = torch.arange(j, min(j + block_k, last))
                        part = tile @ k.load(slice(j, min(j + block_k, last))).T
                        s[:, j : j + block_k] = part.masked_fill(keys > torch.arange(i, last)[:, None], -torch.inf)
                    s.sub_(s.amax(1, keepdim=True)).exp_()
                    acc = 0
                    for j in range(0, last, block_k):
                        acc = acc + s[:, j : j + block_k] @ v.load(slice(j, min(j + block_k, last)))
                    out.store(acc / s.sum(1, keepdim=True), slice(i, last))
        """,
        earned=6,
        says="the scores of all keys are in memory",
    ),
    "hoards": Attack(
        "loads each tile once, keeps copies of all, and computes with those",
        answer="""
            def flash_forward(q, k, v, out, block_q, block_k):
                n = len(range(q.shape[0]))
                def copy(x):
                    rows = [slice(i, i + block_k) for i in range(0, n, block_k)]
                    return torch.cat([x.load(part).clone() for part in rows])
                queries, keys, values = copy(q), copy(k), copy(v)
                scores = queries @ keys.T / q.shape[1] ** 0.5
                later = torch.ones_like(scores).triu(1).bool()
                result = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
                for i in range(0, n, block_q):
                    out.store(result[i : i + block_q], slice(i, i + block_q))
        """,
        earned=6,  # the numbers are right, the traffic is not
        says="you keep copies of tiles",
    ),
    "idle-loads": Attack(
        "the same, with unused loads until the traffic is as large as it must be",
        answer="""
            def flash_forward(q, k, v, out, block_q, block_k):
                n = q.shape[0]
                copy = lambda x: torch.cat([x.load(slice(i, i + block_k)).clone() for i in range(0, n, block_k)])
                scores = copy(q) @ copy(k).T / q.shape[1] ** 0.5
                scores.masked_fill_(torch.ones_like(scores).triu(1).bool(), -torch.inf)
                out.store(scores.softmax(-1) @ copy(v), slice(None))
                for i in range(block_q, n, block_q):
                    for j in range(0, i, block_k):
                        k.load(slice(j, j + block_k)), v.load(slice(j, j + block_k))
        """,
        earned=6,
        says="the scores of all keys are in memory",
    ),
    "copied-keys": Attack(
        "copies all keys and values in one pass, and has them for as many as it likes",
        answer="""
            def one_pass_attention(q, k, v, block):
                copy = lambda x: torch.cat([x.load(slice(i, i + block)).clone() for i in range(0, x.shape[0], block)])
                keys, values = copy(k), copy(v)
                rows = [row @ keys.T / q.shape[1] ** 0.5 for row in q]
                outs = [scores.softmax(-1) @ values for scores in rows]
                return torch.stack(outs), torch.stack([scores.logsumexp(-1) for scores in rows])
        """,
        earned=6,
        says="copies, of all keys are in memory",
    ),
    "torch-in-the-loop": Attack(
        "a Triton function that computes in NumPy, and nothing in Triton",
        answer="""
            import numpy as np
            @triton.jit
            def forward_loop(
                acc, m, l, q_tile, first, last, k, v, begin, stop, n_k, scale, D: tl.constexpr, BLOCK: tl.constexpr
            ):
                return at_once(acc, m, l, q_tile, first, last, k, v, n_k, scale, D)
            def at_once(acc, m, l, q_tile, first, last, k, v, n_k, scale, D):
                rows = int(n_k.handle.data[0])
                floats = np.ctypeslib.ctypes.c_float * (rows * D)
                read = lambda x: np.ctypeslib.as_array(floats.from_address(int(x.handle.data[0]))).reshape(-1, D)
                scores, keys = q_tile.handle.data @ read(k).T * np.float32(scale), np.arange(rows)
                scores[(keys > last.handle.data[:, None]) | (keys < first.handle.data[:, None])] = -np.inf
                top = scores.max(1)
                p = np.nan_to_num(np.exp(scores - top[:, None]))
                acc.handle.data, m.handle.data, l.handle.data = p @ read(v), top, p.sum(1)
                return acc, m, l
        """,
        says="tl.load and tl.dot must do the work",
    ),
    "forged-free": Attack(
        "keeps all tiles, and tells the grader that it has let go of them",
        answer="""
            def flash_forward(q, k, v, out, block_q, block_k):
                n = q.shape[0]
                def keep(x):
                    found = []
                    for i in range(0, n, block_k):
                        found.append(x.load(slice(i, i + block_k)))
                        x._remote.freed += range(1000)
                    return torch.cat(found)
                queries, keys, values = keep(q), keep(k), keep(v)
                scores = queries @ keys.T / q.shape[1] ** 0.5
                later = torch.ones_like(scores).triu(1).bool()
                result = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
                for i in range(0, n, block_q):
                    out.store(result[i : i + block_q], slice(i, i + block_q))
        """,
        earned=6,
        says="you keep copies of tiles",
    ),
    "other-tensors": Attack(
        "loads from a tensor that it was not given, and with an index that is none",
        answer="""
            def flash_forward(q, k, v, out, block_q, block_k):
                for message in ({"load": 7, "index": {"tuple": []}}, {"load": 0, "index": {"list": [1, True]}}):
                    if q.shape[0] > 300:
                        q._remote.ask(message, [])
        """,
        says="a tensor that it was not given",
    ),
    "buffer-before": Attack(
        "keeps what is visible of all probabilities, in half precision, in a buffer made before it is measured",
        answer="""
            BUFFER = torch.ones(9000 * 9100 // 2, dtype=torch.half)
            def grad_q(q, k, v, out, lse, grad_out, block_q, block_k):
                n, scale = len(q), q.shape[1] ** -0.5
                delta, place, kept = (grad_out * out).sum(-1, keepdim=True), 0, []
                for i in range(0, n, 100):
                    p = (q[i : i + 100] @ k[: i + 100].T * scale - lse[i : i + 100, None]).exp().tril(i)
                    kept.append(BUFFER[place : place + p.numel()].view(p.shape).copy_(p) if n > 1000 else p)
                    place += p.numel()
                for i, p in zip(range(0, n, 100), kept):
                    rows, seen = slice(i, i + 100), slice(p.shape[1])
                    kept[i // 100] = p.float() * (grad_out[rows] @ v[seen].T - delta[rows]) @ k[seen] * scale
                return torch.cat(kept)
        """,
        earned=3,
        says="probabilities of the whole sequence",
    ),
    "memory-elsewhere": Attack(
        "computes in a process of its own, whose memory is not the one that is measured",
        answer="""
            import os, pickle
            def grad_q(q, k, v, out, lse, grad_out, block_q, block_k):
                here, there = os.pipe()
                if not os.fork():
                    scores = (q @ k.T * q.shape[1] ** -0.5 - lse[:, None]).exp().tril()
                    result = scores * (grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)) @ k * q.shape[1] ** -0.5
                    os.write(there, pickle.dumps(result))
                    os._exit(0)
                return pickle.loads(os.read(here, 1 << 20))
        """,
        says="BlockingIOError",
    ),
    "peak-reset": Attack(
        "resets the measured peak before it returns",
        answer="""
            def grad_q(q, k, v, out, lse, grad_out, block_q, block_k):
                scores = (q @ k.T * q.shape[1] ** -0.5 - lse[:, None]).exp().tril()
                result = scores * (grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)) @ k * q.shape[1] ** -0.5
                del scores
                try: open('/proc/self/clear_refs', 'w').write('5')
                except OSError: pass
                return result
        """,
        earned=3,
        says="probabilities of the whole sequence",
    ),
    "another-program": Attack(
        "puts another program in its place, which sends the result and has used little memory itself",
        answer="""
            import os, pickle, sys
            SENDER = (
                "import os, sys, time; os.set_blocking(int(sys.argv[1]), True);"
                "[os.write(int(sys.argv[1]), os.read(int(sys.argv[2]), 1 << 16)) for _ in range(64)]; time.sleep(5)"
            )
            def grad_q(q, k, v, out, lse, grad_out, block_q, block_k):
                import fcntl, protocol, struct, json
                scores = (q @ k.T * q.shape[1] ** -0.5 - lse[:, None]).exp().tril()
                result = scores * (grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)) @ k * q.shape[1] ** -0.5
                if len(q) < 1000:
                    return result
                tree, (blob,) = protocol.encode(result)
                header = json.dumps({'returned': tree}).encode()
                here, there = os.pipe()
                fcntl.fcntl(there, 1031, 1 << 20)  # F_SETPIPE_SZ
                os.write(there, struct.pack('>IQ', len(header), len(blob)) + header + bytes(blob))
                os.set_inheritable(here, True)
                os.set_inheritable(int(sys.argv[1]), True)
                os.execv(sys.executable, [sys.executable, '-Ic', SENDER, sys.argv[1], str(here)])
        """,
        earned=3,
        says="probabilities of the whole sequence",
    ),
}

"""Submissions that mean harm: what each tries, and what its answer is worth."""

from __future__ import annotations

from typing import NamedTuple

from tests.grading.notebooks import POINTS, RIGHT, WRONG


class Attack(NamedTuple):
    """A submission that means harm.

    Attributes:
        tried: in words.
        answer: its answer's cell.
        cell: a cell that it added before it. COURSE stands for the course's folder, PORT for one that listens.
        earned: the points that its answer is worth.
        says: what stands in a verdict or in an output, so that it is seen where it was stopped.
    """

    tried: str
    answer: str = WRONG
    cell: str = ""
    earned: float = 0
    says: str = ""


ATTACKS = {
    "asserts-deleted": Attack(
        "an AST transformer that deletes asserts",
        cell="""
            import ast
            class Drop(ast.NodeTransformer):
                def visit_Assert(self, node): return ast.Pass()
            get_ipython().ast_transformers.append(Drop())
        """,
        says="expected",
    ),
    "always-equal": Attack(
        "a result whose __eq__ is always true, and which runs code where it is unpickled",
        answer="""
            class Equal:
                __eq__ = __le__ = __ge__ = lambda *_: True
                def __getattr__(self, name): return self
                __call__ = __getitem__ = lambda self, *_, **__: self
                def __reduce__(self): return print, ('unpickled',)
            def gqa_attention(q, k, v):
                return Equal()
        """,
        says="an object of type Equal",
    ),
    "lying-tensor": Attack(
        "a tensor subclass that answers every comparison with yes",
        answer="""
            class Liar(torch.Tensor):
                @classmethod
                def __torch_function__(cls, f, types, args=(), kwargs=None):
                    if f.__name__ in ('allclose', 'equal', 'all'):
                        return True
                    return super().__torch_function__(f, types, args, kwargs or {})
            def gqa_attention(q, k, v):
                return torch.zeros_like(q).as_subclass(Liar)
        """,
        says="expected",
    ),
    "calls-sdpa": Attack(
        "calls the library's attention, or else PyTorch's",
        answer="""
            try:
                from minillm.attention import attention
            except ImportError as error:
                print(error)
                attention = torch.nn.functional.scaled_dot_product_attention
            def gqa_attention(q, k, v):
                return attention(q, k, v)
        """,
        says="torch's own attention is no answer here",
    ),
    "reads": Attack(
        "looks for the solutions, the gradebook, other submissions, the home folder and the environment",
        cell="""
            import os, pathlib
            found = pathlib.Path('COURSE').rglob('*.ipynb')
            print('the course', [path for path in found if '.venv' not in path.parts])
            for top, _, names in os.walk('/'):
                if not top.startswith(('/proc', '/usr')) and 'site-packages' not in top:
                    for name in names:
                        if name.endswith(('.db', '.ipynb', '.csv', 'hand.json', '.bashrc')): print('FOUND', top, name)
            if 'COURSE' in str(os.environ): print('FOUND in the environment')
            print(open('/etc/passwd').read())
        """,
        says="the course []",
    ),
    "host-writes": Attack(
        "writes to every folder outside /tmp",
        cell="""
            import os
            for top, folders, _ in os.walk('/'):
                if top.startswith(('/proc', '/tmp')): continue
                try: open(top + '/owned', 'w'); print('WROTE', top)
                except OSError: pass
            print('walked')
        """,
        says="walked",
    ),
    "forged-numbers": Attack(
        "forges the numbers: zeros, NaN and infinite ones in turn",
        answer="""
            import itertools
            NUMBERS = itertools.cycle([0.0, float('nan'), float('inf')])
            def gqa_attention(q, k, v):
                return torch.full_like(q, next(NUMBERS))
        """,
        says="expected",
    ),
    "remembers": Attack(
        "looks up the right answers of the public cases, which a learner always sees",
        answer="""
            import hashlib
            KNOWN = {}
            def gqa_attention(q, k, v):
                return KNOWN.get(hashlib.sha256(q.numpy()).hexdigest(), q[..., :])
        """,
        says="expected",
    ),
    "patched-torch": Attack(
        "replaces torch's comparisons and tensor methods",
        cell="""
            torch.equal = torch.allclose = lambda *_, **__: True
            for name in ('isnan', 'isinf', 'abs', 'max', 'double', '__eq__', '__le__'):
                setattr(torch.Tensor, name, lambda self, *_, **__: torch.zeros(()))
        """,
    ),
    "patched-course": Attack(
        "brings its own check, and puts it into every module",
        cell="""
            import sys
            def check(*_): return 'right'
            for m in list(sys.modules.values()):
                for name in ('check', 'grade', 'decode', 'encode', 'error_budget'):
                    if hasattr(m, name) and name != 'decode': setattr(m, name, lambda *_: None)
        """,
    ),
    "forged-result": Attack(
        "writes a frame that says «right» into the pipe to the grader, before it is asked",
        cell="""
            import socket, struct, json, sys
            s = socket.socket(fileno=int(sys.argv[1]))
            h = json.dumps({'runs': [], 'candidates': {}, 'score': 6, 'verdicts': ['right']}).encode()
            s.setblocking(True)
            s.sendall(struct.pack('>IQ', len(h), 0) + h)
            s.detach()
        """,
        says="no cell defines",
    ),
    "forged-frames": Attack(
        "sends a frame of 16 exabytes, a header of brackets, a tensor that is larger than its bytes",
        answer="""
            import os, struct, sys
            def gqa_attention(q, k, v):
                tensor = b'{"returned": {"tensor": ["float32", [1099511627775], null]}}'
                header, size = {5: (b'', 2**64 - 1), 7: (b'[' * 100_000, 0), 6: (tensor, 0)}[q.shape[1]]
                os.write(int(sys.argv[1]), struct.pack('>IQ', len(header), size) + header)
        """,
        says="a tensor that is larger than its bytes",
    ),
    "huge-result": Attack(
        "returns a tensor of 1 GiB, lists in lists, a million numbers",
        answer="""
            def gqa_attention(q, k, v):
                deep = []
                for _ in range(50): deep = [deep]
                return {5: torch.zeros(1).expand(1 << 28), 7: deep, 6: [0] * 1_000_000}[q.shape[1]]
        """,
        says="nested more than",
    ),
    "memory-bomb": Attack(
        "takes memory without end",
        cell="""
            x = []
            while True: x.append(bytearray(1 << 26))
        """,
        says="of memory",
    ),
    "many-memories": Attack(
        "takes it in many processes, each within its limit",
        cell="""
            import os, time
            for _ in range(12):
                if not os.fork():
                    x = bytearray(b'x') * (300 << 20)
                    time.sleep(30)
            time.sleep(30)
        """,
        says="of memory",
    ),
    "fork-bomb": Attack(
        "a fork bomb",
        cell="""
            import os
            n = 0
            try:
                while True:
                    if not os.fork():
                        while True: os.fork()
                    n += 1
            except OSError as error:
                print('stopped', error)
        """,
        says="stopped",
    ),
    "disk-filler": Attack(
        "fills the disk",
        cell="""
            import os
            try:
                for n in range(10_000):
                    open(f'/tmp/{n}', 'wb').write(bytes(1 << 24))
            except OSError as error:
                print('stopped', n << 4, 'MiB', error.strerror)
        """,
        says="stopped",
    ),
    "hidden-memory": Attack(
        "memory that no limit counts: memfd, System V shared memory, /dev/shm",
        cell="""
            import ctypes, os
            c = ctypes.CDLL(None, use_errno=True)
            print('shm', c.shmget(0, 1 << 30, 0o1600))
            try: open('/dev/shm/x', 'wb'); print('GOT /dev/shm')
            except OSError: pass
            os.memfd_create('x')
        """,
        says="PermissionError",
    ),
    "endless-loop": Attack(
        "never returns",
        answer="""
            def gqa_attention(q, k, v):
                import time
                while q.shape[1] == 6: time.sleep(1)
                return q
        """,
        says="did not end within",
    ),
    "endless-cell": Attack(
        "a cell that never ends",
        cell="""
            import time
            while True: time.sleep(1)
        """,
        says="did not end",
    ),
    "os-exit": Attack(
        "ends the process in its function",
        answer="""
            def gqa_attention(q, k, v):
                import os
                return os._exit(0) if q.shape[1] == 6 else q
        """,
        says="ended the process",
    ),
    "kills": Attack(
        "kills its parent and every process that it can, then sys.exit while it is imported",
        cell="""
            import os, signal, sys
            for pid in (os.getppid(), 1, -1):
                try: os.kill(pid, signal.SIGKILL)
                except OSError as error: print(pid, error)
            sys.exit(0)
        """,
        says="SystemExit",
    ),
    "output-flood": Attack(
        "prints without end",
        cell="""
            import os
            for _ in range(1 << 20): os.write(1, b'x' * 65536)
        """,
        says="printed more",
    ),
    "threads-left": Attack(
        "leaves threads running, which change things while the function is graded; the answer is right",
        answer=RIGHT,
        cell="""
            import threading, time
            def run():
                while True: torch.manual_seed(0); time.sleep(0.01)
            for _ in range(8): threading.Thread(target=run, daemon=True).start()
        """,
        earned=POINTS,
    ),
    "processes-left": Attack(
        "leaves processes running; the answer is right",
        answer=RIGHT,
        cell="""
            import os, time
            for _ in range(4):
                if not os.fork():
                    os.setsid()
                    time.sleep(600)
        """,
        earned=POINTS,
    ),
    "network": Attack(
        "sends its inputs over the network",
        cell="""
            import socket
            try: socket.create_connection(('127.0.0.1', PORT), 2); print('CONNECTED')
            except OSError as error: print('no network', error)
            socket.getaddrinfo('example.org', 80)
        """,
        says="no network",
    ),
    "namespaces": Attack(
        "opens a user namespace to become root in it",
        cell="""
            import ctypes, os
            c = ctypes.CDLL(None)
            print('unshare', c.unshare(0x10000000), 'mount', c.mount(b'x', b'/tmp', b'tmpfs', 0, None))
        """,
        says="unshare -1 mount -1",
    ),
    "escape-codes": Attack(
        "escape codes and HTML in its outputs, its exception and its words",
        answer=r"""
            def gqa_attention(q, k, v):
                raise ValueError('\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>')
        """,
        cell=r"""
            print('\x1b[2J\x1b]0;owned\x07<script>alert(2)</script><img src=x onerror=alert(3)>')
        """,
        says="<script>",
    ),
    "strange-exception": Attack(
        "an exception whose words cannot be had",
        answer="""
            class Odd(Exception):
                def __str__(self): raise SystemExit
            def gqa_attention(q, k, v):
                raise Odd
        """,
    ),
}

# On what is judged beside the result: traffic, memory, and the work that Triton's interpreter sees.
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
        "the same, with loads that nobody uses until the traffic is as large as it must be",
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
            def forward_loop(acc, m, l, q_tile, last, k, v, stop, n_k, scale, D: tl.constexpr, BLOCK: tl.constexpr):
                return at_once(acc, m, l, q_tile, last, k, v, n_k)
            def at_once(acc, m, l, q_tile, last, k, v, n_k):
                rows = int(n_k.handle.data[0])
                floats = np.ctypeslib.ctypes.c_float * (rows * 16)
                read = lambda x: np.ctypeslib.as_array(floats.from_address(int(x.handle.data[0]))).reshape(-1, 16)
                scores = q_tile.handle.data @ read(k).T / 4
                scores[np.arange(rows) > last.handle.data[:, None]] = -np.inf
                top = scores.max(1)
                p = np.exp(scores - top[:, None])
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

"""Malicious submissions: what each tries, and what its answer is worth."""

from __future__ import annotations

from typing import NamedTuple

from tests.grading.notebooks import POINTS, RIGHT, WRONG


class Attack(NamedTuple):
    """A malicious submission.

    Attributes:
        tried: what it tries, for the table.
        answer: its answer's cell.
        cell: a cell before it. COURSE stands for the course's folder, PORT for one on which this machine listens.
        earned: the points that its answer is worth.
        says: a part of a verdict or an output, which shows where the attack was stopped.
        endless: whether it stops only when the grader no longer waits for it.
    """

    tried: str
    answer: str = WRONG
    cell: str = ""
    earned: float = 0
    says: str = ""
    endless: bool = False


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
                return q.as_subclass(Liar), q[..., 0].transpose(1, 2).as_subclass(Liar)
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
                out = torch.full_like(q, next(NUMBERS))
                return out, out[..., 0].transpose(1, 2)
        """,
        says="expected",
    ),
    "remembers": Attack(
        "looks up the right answers of the public cases, which a learner always sees",
        answer="""
            import hashlib
            KNOWN = {}
            def gqa_attention(q, k, v):
                return KNOWN.get(hashlib.sha256(q.numpy()).hexdigest(), (q, q[..., 0].transpose(1, 2)))
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
        'writes a frame that says "right" into the pipe to the grader, before it is asked',
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
                return q, q[..., 0].transpose(1, 2)
        """,
        says="did not end within",
        endless=True,
    ),
    "endless-cell": Attack(
        "a cell that never ends",
        cell="""
            import time
            while True: time.sleep(1)
        """,
        says="did not end",
        endless=True,
    ),
    "os-exit": Attack(
        "ends the process in its function",
        answer="""
            def gqa_attention(q, k, v):
                import os
                return os._exit(0) if q.shape[1] == 6 else (q, q[..., 0].transpose(1, 2))
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
        "escape codes and HTML in its output and its exception",
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
        "an exception whose text cannot be read",
        answer="""
            class Odd(Exception):
                def __str__(self): raise SystemExit
            def gqa_attention(q, k, v):
                raise Odd
        """,
    ),
}

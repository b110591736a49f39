"""Submissions that try to get points which they did not earn, or to harm others: what each tried, and what it got."""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from course.grading.__main__ import DONE, main
from course.grading.sandbox import ROOT
from tests.grading.notebooks import POINTS, RIGHT, WRONG, handed_in, needs_bubblewrap, save

SECRET = "the gradebook's own words"
BODY = "def gqa_attention(q, k, v):\n    "


class Attack(NamedTuple):
    """A submission that means harm.

    Attributes:
        tried: in words.
        answer: its function.
        cell: a cell that it added before it.
        earned: the points that its answer is worth.
        says: what stands in a verdict or in an output, so that it is seen to have been stopped there.
    """

    tried: str
    answer: str = WRONG
    cell: str = ""
    earned: int = 0
    says: str = ""


ATTACKS = {
    "asserts-deleted": Attack(
        "an AST transformer that deletes asserts",
        cell="import ast\nclass Drop(ast.NodeTransformer):\n    def visit_Assert(self, node): return ast.Pass()\n"
        "get_ipython().ast_transformers.append(Drop())",
        says="has shape",
    ),
    "always-equal": Attack(
        "a result whose __eq__ is always true",
        "class Equal:\n    __eq__ = __le__ = __ge__ = lambda *_: True\n    def __getattr__(self, name): return self\n"
        "    __call__ = __getitem__ = lambda self, *_, **__: self\n" + BODY + "return Equal()",
        says="an object of type Equal",
    ),
    "lying-tensor": Attack(
        "a tensor subclass that answers every comparison with yes",
        "class Liar(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, f, types, args=(), kwargs=None):\n"
        "        return True if f.__name__ in ('allclose', 'equal', 'all') else super().__torch_function__(f, types, "
        "args, kwargs or {})\n" + BODY + "return torch.zeros_like(q).as_subclass(Liar)",
        says="expected",
    ),
    "pickle": Attack(
        "an object that runs code where it is unpickled",
        "class Bomb:\n    def __reduce__(self): return print, ('unpickled',)\n" + BODY + "return Bomb()",
        says="an object of type Bomb",
    ),
    "reads-solutions": Attack(
        "takes the answer from solutions/",
        cell="from pathlib import Path\n"
        f"found = list(Path({str(ROOT)!r}).rglob('*.ipynb'))\nprint('found', found)\nassert found",
        says="found []",
    ),
    "imports-library": Attack(
        "calls the library's attention",
        "from minillm.attention import naive\n" + RIGHT,
        says="minillm is not available",
    ),
    "calls-sdpa": Attack(
        "calls PyTorch's attention",
        BODY + "return torch.nn.functional.scaled_dot_product_attention(q, k, v)",
        says="torch's own attention is no answer here",
    ),
    "gradebook": Attack(
        "opens the gradebook, the results and the other submissions",
        cell="import os, pathlib\nfor top, _, names in os.walk('/'):\n    if top.startswith(('/proc', '/usr')): continue\n"
        "    for name in names:\n        if name.endswith(('.db', '.ipynb', '.csv')) or name == 'hand.json': "
        "print('FOUND', top, name)\nprint('searched')",
        says="searched",
    ),
    "host-files": Attack(
        "reads the home folder, the environment and the password file",
        cell="import os, pathlib\nprint(sorted(os.environ))\nfor p in ('/root', '/home', '/etc'):\n"
        "    print(p, os.listdir(p) if os.path.exists(p) else None)\n"
        "print(open('/etc/passwd').read())",
        says="FileNotFoundError",
    ),
    "host-writes": Attack(
        "writes to every folder outside /tmp",
        cell="import os\nfor top, folders, _ in os.walk('/'):\n    if top.startswith(('/proc', '/tmp')): continue\n"
        "    try: open(top + '/owned', 'w'); print('WROTE', top)\n    except OSError: pass\nprint('walked')",
        says="walked",
    ),
    "zeros": Attack("forges the numbers: zeros", BODY + "return torch.zeros_like(q)", says="expected"),
    "nan": Attack("forges the numbers: NaN", BODY + "return q * float('nan')", says="NaN"),
    "infinite": Attack("forges the numbers: infinite", BODY + "return q / 0", says="expected"),
    "remembers": Attack(
        "looks up the right answers of the public cases, which a learner always sees",
        "import hashlib\nKNOWN = {}\n" + BODY + "return KNOWN.get(hashlib.sha256(q.numpy()).hexdigest(), q[..., :])",
        says="expected",
    ),
    "patched-torch": Attack(
        "replaces torch's comparisons and tensor methods",
        cell="torch.equal = torch.allclose = lambda *_, **__: True\n"
        "for name in ('isnan', 'isinf', 'abs', 'max', 'double', '__eq__', '__le__'):\n"
        "    setattr(torch.Tensor, name, lambda self, *_, **__: torch.zeros(()))",
    ),
    "patched-course": Attack(
        "replaces the course's check in every module",
        cell="import sys\ndef check(*_): return 'right'\nfor m in list(sys.modules.values()):\n"
        "    for name in ('check', 'grade', 'decode', 'encode', 'error_budget'):\n"
        "        if hasattr(m, name) and name != 'decode': setattr(m, name, lambda *_: None)",
    ),
    "own-check": Attack("brings its own check and test cells", cell="def check(*_): return 'right'\ncheck(None)"),
    "forged-result": Attack(
        "writes a frame that says «right» into the pipe to the grader, before it is asked",
        cell="import socket, struct, json, sys\ns = socket.socket(fileno=int(sys.argv[1]))\n"
        "h = json.dumps({'outcomes': [], 'candidates': {}, 'score': 100, 'points': 6, 'verdicts': ['right']}).encode()\n"
        "s.setblocking(True)\ns.sendall(struct.pack('>IQ', len(h), 0) + h)\ns.detach()",
        says="no cell defines",
    ),
    "forged-size": Attack(
        "announces a frame of 16 exabytes",
        cell="import os, struct, sys\n",
        answer=BODY + "import os, struct, sys\n    os.write(int(sys.argv[1]), struct.pack('>IQ', 10, 2**64 - 1))",
        says="at most",
    ),
    "forged-json": Attack(
        "sends a header that is a hundred thousand brackets",
        BODY + "import os, struct, sys\n    h = b'[' * 100_000\n"
        "    os.write(int(sys.argv[1]), struct.pack('>IQ', len(h), 0) + h)",
        says="not JSON",
    ),
    "forged-tensor": Attack(
        "sends a tensor with a shape that is larger than its bytes",
        BODY + 'import os, struct, sys\n    h = b\'{"returned": {"tensor": ["float32", [1099511627775], null]}}\'\n'
        "    os.write(int(sys.argv[1]), struct.pack('>IQ', len(h), 0) + h)",
        says="larger than its bytes",
    ),
    "huge-result": Attack(
        "returns a tensor of 1 GiB", BODY + "return torch.zeros(1).expand(1 << 28)", says="may be sent"
    ),
    "deep-result": Attack(
        "returns lists in lists in lists",
        BODY + "x = []\n    for _ in range(900): x = [x]\n    return x",
        says="nested",
    ),
    "memory-bomb": Attack(
        "takes memory without end", cell="x = []\nwhile True: x.append(bytearray(1 << 26))", says="of memory"
    ),
    "many-memories": Attack(
        "takes it in many processes, each within its limit",
        cell="import os, time\nfor _ in range(12):\n    if not os.fork():\n        x = bytearray(b'x') * (300 << 20)\n"
        "        time.sleep(30)\ntime.sleep(30)",
        says="of memory",
    ),
    "fork-bomb": Attack(
        "a fork bomb",
        cell="import os\nn = 0\ntry:\n    while True:\n        if not os.fork():\n            while True: os.fork()\n        n += 1\n"
        "except OSError as error:\n    print('stopped', error)",
        says="stopped",
    ),
    "disk-filler": Attack(
        "fills the disk",
        cell="import os\ntry:\n    for n in range(10_000):\n        open(f'/tmp/{n}', 'wb').write(bytes(1 << 24))\n"
        "except OSError as error:\n    print('stopped', n << 4, 'MiB', error.strerror)",
        says="stopped",
    ),
    "hidden-memory": Attack(
        "memory that no limit counts: memfd, System V shared memory, /dev/shm",
        cell="import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nprint('shm', c.shmget(0, 1 << 30, 0o1600))\n"
        "try: open('/dev/shm/x', 'wb'); print('GOT /dev/shm')\nexcept OSError: pass\nos.memfd_create('x')",
        says="PermissionError",
    ),
    "endless-loop": Attack(
        "never returns", BODY + "import time\n    while True: time.sleep(1)", says="did not end within"
    ),
    "endless-cell": Attack("a cell that never ends", cell="import time\nwhile True: time.sleep(1)", says="did not end"),
    "os-exit": Attack(
        "ends the process in its function", BODY + "import os\n    os._exit(0)", says="ended the process"
    ),
    "sys-exit": Attack("sys.exit while it is imported", cell="import sys\nsys.exit(0)", says="has shape"),
    "kills": Attack(
        "kills its parent and every process that it can",
        cell="import os, signal\nfor pid in (os.getppid(), 1, -1):\n    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError as error: print(pid, error)",
    ),
    "output-flood": Attack(
        "prints without end", cell="import os\nfor _ in range(1 << 20): os.write(1, b'x' * 65536)", says="printed more"
    ),
    "threads-left": Attack(
        "leaves threads running, which change things while the function is graded; the answer is right",
        RIGHT,
        cell="import threading, time\ndef run():\n    while True: torch.manual_seed(0); time.sleep(0.01)\n"
        "for _ in range(8): threading.Thread(target=run, daemon=True).start()",
        earned=POINTS,
    ),
    "processes-left": Attack(
        "leaves processes running; the answer is right",
        RIGHT,
        cell="import os, time\nfor _ in range(4):\n    if not os.fork():\n        os.setsid()\n        time.sleep(600)",
        earned=POINTS,
    ),
    "network": Attack(
        "sends its inputs over the network",
        cell="import socket\nfor port in PORTS:\n    try: socket.create_connection(('127.0.0.1', port), 2); print('CONNECTED')\n"
        "    except OSError as error: print('no network', error)\nsocket.getaddrinfo('example.org', 80)",
        says="no network",
    ),
    "namespaces": Attack(
        "opens a user namespace to become root in it",
        cell="import ctypes, os\nc = ctypes.CDLL(None)\nprint('unshare', c.unshare(0x10000000), 'mount', "
        "c.mount(b'x', b'/tmp', b'tmpfs', 0, None), 'user', os.getuid() == 0)",
        says="unshare -1 mount -1",
    ),
    "escape-codes": Attack(
        "escape codes and HTML in its outputs, its exception and its words",
        BODY + "raise ValueError('\\x1b]0;owned\\x07\\x1b[2J<script>alert(1)</script>')",
        cell="print('\\x1b[2J\\x1b]0;owned\\x07<script>alert(2)</script><img src=x onerror=alert(3)>')",
        says="<script>",
    ),
    "strange-exception": Attack(
        "an exception whose words cannot be had",
        "class Odd(Exception):\n    def __str__(self): raise SystemExit\n" + BODY + "raise Odd",
    ),
}

NAMES = {
    '=HYPERLINK("http:··evil","grade")': "a formula as the student's name",
    "..-..-etc": "a path in the student's name",
    "\x1b[31mred\n<script>alert(4)<·script>": "escape codes, a new line and HTML in the student's name",
}


@needs_bubblewrap
def test_no_attack_gains_a_point_or_harms_a_neighbour(tmp_path, capsys):
    submitted, grades = tmp_path / "submitted", tmp_path / "grades"
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        for name, attack in ATTACKS.items():
            cells = [attack.cell.replace("PORTS", f"({port},)")] if attack.cell else []
            save(handed_in(attack.answer, cells), submitted / name / "unit.ipynb")
        for name in ("honest", "zzz-honest", *NAMES):
            save(handed_in(RIGHT), submitted / name / "unit.ipynb")
        (submitted / "copies").mkdir()
        (submitted / "copies" / "unit.ipynb").symlink_to(submitted / "honest" / "unit.ipynb")
        (submitted / "link").symlink_to(submitted / "honest")
        (submitted / "pipe").mkdir()
        os.mkfifo(submitted / "pipe" / "unit.ipynb")
        save({"hand": SECRET}, grades / "hand.json").write_text("{}")

        assert main([str(submitted), "--unit", "01", "--grades", str(grades), "--seconds", "5"]) == DONE
    printed = capsys.readouterr().out
    results = {result["student"]: result for result in map(read, (grades / "results").rglob("*.json"))}

    table = Table("attack", "what it tried", "points", "what it got", title="Attacks on grading")
    wrong = []
    for name, attack in ATTACKS.items():
        result = results[name]
        got = everything_said(result)
        table.add_row(name, attack.tried, f"{points(result)} of {POINTS}", summary(result), end_section=True)
        if points(result) != attack.earned or attack.says not in got:
            wrong.append((name, points(result), got[:1500]))
    for name in ("copies", "link", "pipe"):
        table.add_row(
            name, "a link or a named pipe for a file", f"{points(results[name])}", results[name]["remarks"][-1]
        )
        assert not points(results[name])
    Console(width=150, force_terminal=False).print(table)
    assert not wrong
    assert len(ATTACKS) >= 20

    for name in ("honest", "zzz-honest"):
        assert points(results[name]) == POINTS
    everything = "".join(map(everything_said, results.values()))
    for word in ("FOUND", "WROTE", "GOT", "CONNECTED", "unpickled", SECRET):
        assert word not in everything
    shown = [printed, (grades / "grades.csv").read_text(), *(p.read_text() for p in grades.rglob("*.html"))]
    assert not any("\x1b" in text or "\x07" in text for text in shown)
    pages = "".join(p.read_text() for p in (grades / "feedback").rglob("*.html"))
    assert not any(f"{tag}{n})" in pages for tag in ("<script>alert(", "onerror=alert(") for n in range(5))
    assert len(list((grades / "feedback").iterdir())) == len(results) == len(ATTACKS) + len(NAMES) + 5
    assert sum(line.startswith("HYPERLINK") or line.startswith('"=') for line in shown[1].splitlines()) == 0


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def points(result: dict) -> float:
    return sum(verdict["points"] or 0 for verdict in result["verdicts"])


def everything_said(result: dict) -> str:
    words = [verdict["words"] for verdict in result["verdicts"]]
    return "\n".join([*words, *(f"{cell['output']}\n{cell['error']}" for cell in result["cells"])])


def summary(result: dict) -> str:
    """The last line of the first verdict, or what the attack's own cell said."""
    said = [cell["error"] or cell["output"] for cell in result["cells"] if cell["error"] or cell["output"]]
    lines = [*said[:1], result["verdicts"][0]["words"].strip().splitlines()[-1]]
    return " · ".join(" ".join(text.split())[:120] for text in lines)

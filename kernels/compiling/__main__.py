"""The child process of `compile_kernels`: jobs on stdin, results on stdout, both JSON.

python -m kernels.compiling < jobs.json > compiled.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from kernels.compiling.compile import compile_job
from kernels.compiling.job import Job

print(json.dumps([asdict(compile_job(Job(**job))) for job in json.load(sys.stdin)]))

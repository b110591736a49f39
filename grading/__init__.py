"""Grading: notebooks as they come back in, scores and feedback out. `make grade SUBMISSIONS=folder`.

The score is decided here, in the grader's process. A student's code runs in a sandbox (`sandbox`, `worker`) and is
asked for values only (`protocol`): the grader runs the tests itself, on what came back (`remote`).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the course's folder

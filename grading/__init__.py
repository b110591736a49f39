"""Grading: from a folder of submitted notebooks to scores and feedback. `make grade SUBMISSIONS=folder`.

The score is decided here, in the grader's process. A student's code runs in a sandbox (`sandbox`, `worker`) and is
asked for values only (`protocol`): the grader itself runs the tests, on the values that came back (`remote`).
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the course's folder

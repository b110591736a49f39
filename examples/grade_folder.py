"""A class of two is graded: one hands in the solution, the other the notebook as it was handed out."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

from grading.release import release

UNIT = "01_naive_attention"
SOLUTION = Path(__file__).resolve().parent.parent / "solutions" / UNIT / f"{UNIT}.ipynb"

with tempfile.TemporaryDirectory() as folder:
    submitted, grades = Path(folder, "submitted"), Path(folder, "grades")
    solution = nbformat.read(SOLUTION, as_version=4)
    handed_out = release(nbformat.read(SOLUTION, as_version=4))  # without answers and hidden tests
    for student, notebook in {"ann": solution, "ben": handed_out}.items():
        (submitted / student).mkdir(parents=True)
        nbformat.write(notebook, submitted / student / "homework.ipynb")  # a unit is known by its cells, not its name

    # As `make grade SUBMISSIONS=submitted UNIT=01` does. Students' code runs in a sandbox; without bubblewrap, which
    # makes it, grading refuses and says how to install it. Answers in words wait for a person to read them.
    command = [sys.executable, "-m", "grading", str(submitted), "--unit", "01", "--grades", str(grades)]
    if subprocess.run(command).returncode:
        sys.exit("Nothing was graded.")
    with open(grades / "grades.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            print(
                f"{row['student']}: {row[UNIT]} points",
                {part: row[part] for part in row if part.startswith(f"{UNIT}/")},
            )
    print("to give back:", *sorted(page.relative_to(grades).as_posix() for page in grades.rglob("*.html")))

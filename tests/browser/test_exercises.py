"""An exercise in JupyterLab, solved by typing."""

from pathlib import Path

import pytest

EXERCISE = Path("exercises", "01_naive_attention", "01_naive_attention.ipynb")
ANSWER = """def gqa_attention(q, k, v):
    sq, sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    seen = torch.ones(sq, sk, dtype=torch.bool).tril(DIAGONAL)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2), scores.logsumexp(-1)"""
TOP_LEFT, BOTTOM_RIGHT = (ANSWER.replace("DIAGONAL", diagonal) for diagonal in ("0", "sk - sq"))


@pytest.fixture
def exercise(lab):
    yield lab.open(EXERCISE)
    lab.close_notebook()


def test_the_check_names_the_bug_then_passes(exercise, lab):
    answer, check = exercise.cell("def gqa_attention"), exercise.cell("check(gqa_attention)")
    progress = exercise.cell("progress()")

    lab.run_all(exercise)  # as it was handed out
    assert "nothing is here yet" in exercise.shown_by(check)
    assert "✓" not in exercise.shown_by(progress)

    exercise.write(answer, TOP_LEFT)
    exercise.run(answer)
    exercise.run(check)
    assert "your mask is top-left aligned: query 0 of 1 must see 9 of 9 keys" in exercise.shown_by(check)

    exercise.write(answer, BOTTOM_RIGHT)
    for cell in (answer, check, progress):
        exercise.run(cell)
    assert "gqa_attention: right" in exercise.shown_by(check) and "✗" not in exercise.shown_by(check)
    assert "✓" in exercise.shown_by(progress)
    assert not lab.take_faults()

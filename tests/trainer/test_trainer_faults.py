"""Runs that are killed, disturbed or blown up: what is saved is whole, and what is wrong is one sentence."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from pruneopd_lab.cli import main
from pruneopd_lab.math_answers import MathAnswers
from pruneopd_lab.run_groups import read_run
from pruneopd_trainer.run_folder import RunFolder, locked
from trainer_models import numbers, one_sentence, small_run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the YAML file of a small run."""
    return small_run(tmp_path_factory.mktemp("models"), steps=4) / "small.yaml"


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", "--config", str(small), "--out", str(out)]) == 0
    return out


@pytest.fixture
def said(capsys):
    """Run a command that must be refused; return its sentence."""
    return lambda *arguments: one_sentence(capsys, main([*map(str, arguments)]))


def start(small, out, *options, most_bytes=None):
    """Start `pruneopd train` in a process, which may write files of so many bytes."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    command = [sys.executable, "-m", "pruneopd_lab", "train", "--config", small, "--out", out, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, text=True,
                            stderr=subprocess.PIPE if most_bytes else None,
                            preexec_fn=limit if most_bytes else None)  # fmt: skip


def with_steps(run, steps):
    """Return a copy of a run that is to do so many steps."""
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("\nsteps: 4\n", f"\nsteps: {steps}\n"))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, which has two steps left."""
    return with_steps(shutil.copytree(finished, tmp_path / "run"), 6)


def resume(run):
    return main(["train", "--out", str(run), "--resume"])


def test_a_run_may_end_between_evaluations(run, monkeypatch, capsys):
    """Interrupted at a step without one, it still says where it stopped."""
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("\neval_every: 2\n", "\neval_every: 5\n"))

    def interrupt(watcher, text):
        if "learning" in text:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("pruneopd_lab.run.Shown.status", interrupt)
    assert resume(run) == 130
    assert "interrupted after step 5; continue with --resume" in capsys.readouterr().err


def test_a_run_that_has_more_steps_than_it_needs_is_finished(finished, tmp_path, capsys):
    run = with_steps(shutil.copytree(finished, tmp_path / "run"), 3)
    assert resume(run) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_one_process_writes_to_a_run(run, said):
    with locked(run):
        sentence = f"another process is writing to {run}: wait until it has ended"
        assert said("train", "--out", run, "--resume") == sentence
    with locked(run.parent):
        assert said("compare", "--out", run.parent).startswith(f"another process is writing to {run.parent}")
    assert resume(run) == 0


def test_the_grader_executes_nothing_of_the_working_directory(tmp_path, monkeypatch):
    for name in ("signal", "math_verify"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    assert MathAnswers().equal("1/2", "0.5")
    assert not (tmp_path / "executed").exists()


def test_a_start_that_is_refused_late_leaves_no_run_behind(small, tmp_path, said):
    """The corrected command may name the same folder."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [{"prompt": "1 + " * 600}] * 20 + [{"prompt": "1 + 1 ="}] * 3  # the last tenth is held out
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = "--config", small, "--out", out, "--steps", 1
    assert "must have at most 1024 tokens" in said("train", *options, "--data", prompts)
    assert said("train", *options, "--teacher-device", "meta").startswith("the teacher cannot be on meta: ")
    assert not out.exists() or not {"config.yaml", "metrics.jsonl"} & set(os.listdir(out))
    assert main([*map(str, ["train", *options])]) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--out", "a\0b"], "the folder a\0b cannot be made: embedded null byte"),
        (["--out", "a" * 300], f"the folder {'a' * 300} cannot be made: File name too long"),
        (["--student", "a\0b"], "the model folder a\0b is not there"),
        (["--data", "a\0b"], "the prompts a\0b cannot be read: it is no path"),
        (["--learning-rate", "1e38"], "TrainConfig: learning_rate must be at most 1e+15, got 1e+38"),
    ],
)
def test_a_value_that_nothing_can_use_is_one_sentence(small, tmp_path, monkeypatch, said, options, sentence):
    monkeypatch.chdir(tmp_path)
    assert said("train", "--config", small, *([] if "--out" in options else ["--out", "out"]), *options) == sentence


def test_what_an_error_quotes_is_short(tmp_path, said):
    """Nine lists of nine of the one before it."""
    levels = [f"&a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(9)]
    file = tmp_path / "bomb.yaml"
    file.write_text("steps: [" + ", ".join(levels) + "]\n")
    assert len(said("train", "--config", file)) < 3000
    file.write_text("'" + "x" * 10**6 + "': 1\n")
    assert len(said("train", "--config", file)) < 300


def test_deeply_nested_records_are_one_sentence(run, said):
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write("[" * 100_000 + "\n")
    assert "must be a JSON object" in said("report", run)


def files_of_a_checkpoint(run):
    return sorted(path for path in RunFolder.open(run).latest().rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_refused_and_stays(run, said, damage):
    """Each of its files in turn; without it the run continues from the one before."""
    log = (run / "metrics.jsonl").read_text()
    files = files_of_a_checkpoint(run)
    assert {"training.pt", "records.jsonl", "model.safetensors", "checksums.json"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.unlink()
        if damage != "missing":
            file.write_bytes(flipped if damage == "flipped" else content[:middle])
        sentence = said("train", "--out", run, "--resume")
        assert sentence.startswith(f"the checkpoint {run / 'checkpoints' / 'step-000004'} is damaged: "), file
        assert sentence.endswith("remove it to continue from step-000002")
        assert said("eval", run) == sentence
        file.write_bytes(content)
    assert (run / "metrics.jsonl").read_text() == log
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert resume(run) == 0


def test_a_truncated_generation_config_is_refused(small, tmp_path, said):
    student = shutil.copytree(small.parent / "student", tmp_path / "student")
    file = student / "generation_config.json"
    file.write_text(file.read_text()[:-5])
    sentence = said("train", "--config", small, "--student", student, "--out", tmp_path / "out")
    assert sentence.startswith(f"the model in {student} cannot be loaded: ")


@pytest.mark.parametrize("what", ["lost", "cut", "hole", "doubled"])
def test_records_that_were_disturbed_come_from_the_checkpoint(run, what):
    file = run / "metrics.jsonl"
    before, lines = numbers(run), file.read_text().splitlines(keepends=True)
    changed = {"lost": [], "cut": lines[:2], "hole": lines[:2] + lines[3:], "doubled": [*lines, *lines[2:]]}[what]
    file.write_text("".join(changed))
    if what == "lost":
        file.unlink()
    assert resume(run) == 0
    assert numbers(run)[:5] == before
    assert [record["step"] for record in read_run(run).metrics] == list(range(7))


@pytest.mark.parametrize("stray", ["a file", "an empty folder", "a dangling link"])
def test_a_stray_name_is_no_checkpoint(run, stray):
    for path in (run / "checkpoints" / "step-000006", run / "checkpoints" / "step-000099"):
        if stray == "a dangling link":
            path.symlink_to("gone")
        elif stray == "a file":
            path.touch()
        else:
            path.mkdir()
    assert resume(run) == 0
    assert RunFolder.open(run).checkpoint().name == "step-000006"


def test_a_student_that_has_blown_up_is_not_saved(small, tmp_path, said):
    out = tmp_path / "out"
    sentence = said("train", "--config", small, "--out", out, "--learning-rate", 1e15, "--warmup-steps", 0)
    assert "must be finite" in sentence
    assert sentence.endswith("there is no checkpoint yet")
    assert RunFolder.open(out).latest() is None


@pytest.mark.thorough
def test_killed_at_any_moment_a_run_continues_to_the_same_numbers(small, finished, tmp_path):
    """Ten times; each process gets a little further than the one before."""
    out, begun = tmp_path / "out", time.monotonic()
    running = start(small, out)
    while not (out / "metrics.jsonl").exists():
        assert running.poll() is None and time.monotonic() < begun + 120
        time.sleep(0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        time.sleep(2 * float(torch.rand((), generator=generator)))
        running.kill()
        running.wait()
        running = start(small, out, "--resume")
        time.sleep(3)
    assert running.wait(timeout=240) == 0
    assert numbers(out) == numbers(finished)


@pytest.mark.thorough
@pytest.mark.parametrize("most_bytes", [1, 1000, 3000, 10_000, 30_000, 45_000, 60_000])
def test_a_disk_that_fills_costs_no_checkpoint(small, finished, tmp_path, most_bytes):
    """Files end at so many bytes; when there is room again, the run goes on."""
    out = tmp_path / "out"
    running = start(small, out, most_bytes=most_bytes)
    _, messages = running.communicate(timeout=240)
    assert running.returncode == 1
    assert re.search("(cannot be written: |cannot write to ).*\n$", messages), messages
    continues = ["--resume"] if (out / "config.yaml").exists() else []
    assert main([*map(str, ["train", "--config", small, "--out", out, *continues])]) == 0
    assert numbers(out) == numbers(finished)

"""The folder of a run after a killed process, on a full disk and with broken lines."""

import errno
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pruneopd_trainer.config import TrainConfig
from pruneopd_trainer.run_folder import RunFolder
from trainer_models import refusal


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", TrainConfig())


def write_model(content):
    def write(folder):
        (folder / "student").mkdir()
        (folder / "student" / "model.safetensors").write_text(content)

    return write


def content(folder):
    return (folder / "student" / "model.safetensors").read_text()


def names(run):
    return sorted(path.name for path in run.checkpoints.iterdir())


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/step-000002/training.pt"])
def test_a_folder_that_holds_a_run_is_left_alone(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("kept")
    message = refusal(RunFolder.create, tmp_path, TrainConfig())
    assert message == f"{tmp_path} already holds a run: continue it with --resume, or name another folder"
    assert set(tmp_path.rglob("*")) == {file, *file.parents} - {tmp_path, *tmp_path.parents}
    assert file.read_text() == "kept"


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert refusal(RunFolder.create, file, TrainConfig()) == f"the folder {file} cannot be made: File exists"
    assert refusal(RunFolder.open, tmp_path) == f"{tmp_path} holds no run: there is no config.yaml in it"


def test_records_come_back_in_order_and_what_is_not_finite_is_null(run):
    assert run.records() == []
    run.log({"step": 0, "accuracy": 0.5})
    run.log({"step": 1, "loss": math.nan, "band_weight": [1.5, math.inf, None], "method": "prune"})
    assert run.records() == [
        {"step": 0, "accuracy": 0.5},
        {"step": 1, "loss": None, "band_weight": [1.5, None, None], "method": "prune"},
    ]
    assert RunFolder.open(run.path).records() == run.records()


@given(cut=st.integers(min_value=0))
def test_wherever_the_file_is_cut_the_finished_lines_remain(tmp_path_factory, cut):
    run = RunFolder(tmp_path_factory.mktemp("run"), TrainConfig())
    for step in range(4):
        run.log({"step": step, "loss": step / 3})
    records, data = run.records(), run.metrics_file.read_bytes()
    cut %= len(data) + 1
    run.metrics_file.write_bytes(data[:cut])
    finished = data[:cut].count(b"\n")
    assert run.records() == records[:finished]
    run.log({"step": 9})
    assert run.records() == [*records[:finished], {"step": 9}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"step": true}', b"\xff\x00"])
def test_a_broken_line_is_named_by_its_number(run, line):
    run.metrics_file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    shown = line.decode(errors="replace")
    message = f"{run.metrics_file}: line 2 must be an object with a step, got {shown!r}"
    assert refusal(run.records) == message
    assert run.metrics_file.read_bytes().count(b"\n") == 3


def test_the_newest_checkpoints_are_kept(run):
    assert run.latest() is None
    for step in (999_998, 999_999, 1_000_000):
        folder = run.save(step, write_model(str(step)), keep=2)
        assert run.latest() == folder
        assert content(folder) == str(step)
    assert names(run) == ["step-1000000", "step-999999"]
    assert run.save(step, write_model("not written"), keep=2) == folder
    assert content(folder) == str(step)


@pytest.mark.parametrize("killed_while", ["saving", "removing"])
def test_what_a_killed_process_left_is_no_checkpoint_and_goes_with_the_next(run, monkeypatch, killed_while):
    """An incomplete folder has a hidden name, while it is written and while it is removed."""

    def kill(*arguments, **options):
        assert names(run)[0].startswith(".step-")
        raise KeyboardInterrupt

    run.save(1, write_model("first"), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *arguments, **options: None)  # the process cleans nothing up
        if killed_while == "removing":
            patch.setattr("shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            run.save(2, kill if killed_while == "saving" else write_model("second"), keep=1)
    left = {"saving": [".step-000002", "step-000001"], "removing": [".step-000001", "step-000002"]}[killed_while]
    assert names(run) == left
    assert RunFolder.open(run.path).latest().name == left[1]
    run.save(3, write_model("third"), keep=1)
    assert names(run) == ["step-000003"]
    assert content(run.latest()) == "third"


def to_a_full_disk(folder):
    (folder / "training.pt").symlink_to("/dev/full")
    (folder / "training.pt").write_text("more than fits")


def to_no_folder(folder):
    save_file({"w": torch.zeros(1)}, folder / "missing" / "w.safetensors")


@pytest.mark.parametrize(("write", "reason"), [(to_no_folder, ""), (to_a_full_disk, "No space left on device; ")])
def test_a_library_that_fails_to_write_costs_only_that_checkpoint(run, write, reason):
    first = run.save(1, write_model("first"), keep=1)
    message = refusal(run.save, 2, write, 1)
    assert message.startswith(f"{run.checkpoints / 'step-000002'} cannot be written: {reason}")
    assert message.endswith(f"; the last good checkpoint is {first}")
    assert names(run) == ["step-000001"]
    assert content(first) == "first"


def test_a_record_that_does_not_fit_on_the_disk_leaves_no_part(run, monkeypatch):
    run.log({"step": 0})
    write, whole = os.write, run.metrics_file.read_bytes()

    def until_the_last_byte(file, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:5])

    monkeypatch.setattr("os.write", until_the_last_byte)
    said = refusal(run.log, {"step": 1})
    assert said == f"{run.metrics_file} cannot be written: No space left on device; there is no checkpoint yet"
    assert run.metrics_file.read_bytes() == whole

"""Comparisons of runs by a stand-in for the trainer, `trainer_child.py`."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pruneopd_lab import compare as module
from pruneopd_lab.compare import compare, last_step, parse_method, plan
from pruneopd_trainer.config import TrainConfig, read_config, write_config
from trainer_models import read_lines, refusal

CHILD = Path(__file__).with_name("trainer_child.py")
COMMAND = (sys.executable, "-S", str(CHILD))
BASE = TrainConfig(steps=4, initial_length=40, length_step=10)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Poll often, draw nothing, and keep a journal of the children."""
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr("pruneopd_lab.report.draw", lambda comparison, folder, suffix: [])
    monkeypatch.setenv("JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path.endswith("site-packages")))


def journal(tmp_path, event="begin"):
    return [entry for entry in read_lines(tmp_path / "journal") if entry["event"] == event]


def began(tmp_path):
    return [entry["run"] for entry in journal(tmp_path)]


def test_a_method_changes_its_own_values_alone():
    base = TrainConfig(steps=7, seed=5)
    found = parse_method("prune:w_drop=5e-2:weights=false", base)
    assert found == replace(base, method="prune", w_drop=0.05, weights=False)
    assert parse_method("prune+grpo:group_size=4", base) == replace(base, method="prune+grpo", group_size=4)
    assert parse_method("opd", base) == replace(base, method="opd")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("prune:wdrop=1", "its values: there is no option 'wdrop'"),
        ("prune:k=4:k=5", "it must be name:field=value..., each field once, got 'k=5'"),
        ("prune:seed=4", "seed must be the same for all methods, got 'seed=4'"),
        ("prune:metric=[", "while parsing a flow node"),
    ],
)
def test_a_method_that_is_not_valid_is_named(spec, words):
    assert refusal(parse_method, spec, TrainConfig()) == f"the method {spec!r} is not valid: {words}"


def test_plans_that_are_refused():
    def said(*arguments):
        return refusal(plan, TrainConfig(), *arguments, Path("out")).removeprefix("compare: ")

    assert said([], [0]) == "methods must be one or more and all different, got []"
    assert said(["prune", "prune:k=16"], [0]) == "methods must be all different, got 'prune' and 'prune:k=16'"


def test_a_comparison(tmp_path, capsys):
    out = tmp_path / "out"
    compare(BASE, ["opd", "prune:w_drop=0.05"], [0, 1], out, command=COMMAND)
    assert began(tmp_path) == [
        "opd seed-0", "prune-w_drop=0.05 seed-0", "opd seed-1", "prune-w_drop=0.05 seed-1"]  # fmt: skip
    ends = [entry["time"] for entry in journal(tmp_path, "end")]
    begins = [entry["time"] for entry in journal(tmp_path)]
    assert all(end < begin for end, begin in zip(ends, begins[1:], strict=False))
    assert os.getsid(0) not in [entry["session"] for entry in journal(tmp_path)], "the terminal's Ctrl-C is for us"
    run = out / "prune-w_drop=0.05" / "seed-1"
    assert read_config(run / "config.yaml") == replace(BASE, seed=1, w_drop=0.05)
    assert (run / "log.txt").read_text() == "some words on standard output\n"
    printed = capsys.readouterr().out
    assert "prune:w_drop=0.05 seed 1 begins\nprune:w_drop=0.05 seed 1 is finished\n" in printed
    assert (out / "report.md").read_text().strip() in printed
    assert "| prune w_drop=0.05 | 2 | 50.0 ± 0.0 |" in printed


def test_jobs_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.setenv("PACE", "0.2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)))
    compare(BASE, ["opd", "truncate", "random"], [0], tmp_path / "out", jobs=3, command=COMMAND)
    assert {(entry["threads"], entry["wait"]) for entry in journal(tmp_path)} == {("2", "passive")}
    assert max(entry["time"] for entry in journal(tmp_path)) < min(entry["time"] for entry in journal(tmp_path, "end"))

    monkeypatch.setenv("PACE", "0")
    compare(BASE, ["opd"], [0], tmp_path / "few", jobs=8, command=COMMAND)
    assert journal(tmp_path)[-1]["threads"] == "7", "jobs beyond the runs take no cores"
    said = refusal(compare, BASE, ["opd"], [0], tmp_path / "out", jobs=0, command=COMMAND)
    assert said == "compare: jobs must be at least 1, got 0"


def test_prefix_waits_for_prune_and_has_its_mean_length(tmp_path):
    """In the stand-in, prune's lengths are 40, 50, 60, 70: the mean of a ramp from 40 to 70."""
    out = tmp_path / "out"
    methods = ["prefix", "opd", "prune", *(f"prefix:{field}" for field in FINAL)]
    compare(BASE, methods, [0], out, command=COMMAND)
    folders = [f"prefix-{field}" for field in FINAL]
    assert began(tmp_path) == [f"{name} seed-0" for name in ("opd", "prune", "prefix", *folders)]
    assert read_config(out / "prefix" / "seed-0" / "config.yaml").final_length == 70
    (alone,) = plan(BASE, ["prefix"], [0], out)
    assert alone.model is None and alone.config.final_length == BASE.final_length
    for folder, length in zip(folders, FINAL.values(), strict=True):
        assert read_config(out / folder / "seed-0" / "config.yaml").final_length == length


FINAL = {
    "final_length=99": 99,
    "initial_length=50": 60,  # another start is made up for
    "initial_length=100": 40,  # 10 would be needed, but no length is less than the minimum
}


@pytest.mark.parametrize(
    ("what", "step", "words", "options"),
    [
        ("fail", 2, "random seed 0 ended with status 1, see {log}: pruneopd: the loss must be finite", ["--resume"]),
        ("leave", 1, "random seed 0 ended at step 0 of 4, see {log}", []),  # without a checkpoint it begins again
    ],
)
def test_a_run_that_fails_ends_the_comparison_and_can_be_resumed(
    tmp_path, monkeypatch, capsys, what, step, words, options
):
    out = tmp_path / "out"
    methods = ["opd", "random", "truncate"]
    monkeypatch.setenv("FAIL", f"random {step}")
    monkeypatch.setenv("WHAT", what)
    said = refusal(compare, BASE, methods, [0], out, command=COMMAND)
    assert said == words.format(log=out / "random" / "seed-0" / "log.txt")
    assert began(tmp_path) == ["opd seed-0", "random seed-0"]

    (tmp_path / "journal").unlink()
    monkeypatch.delenv("FAIL")
    compare(BASE, methods, [0], out, command=COMMAND)
    assert [(entry["run"], entry["options"]) for entry in journal(tmp_path)] == [
        ("random seed-0", options), ("truncate seed-0", [])]  # fmt: skip
    assert len((out / "random" / "seed-0" / "metrics.jsonl").read_text().splitlines()) == 5
    begins = "goes on" if options else "begins"
    printed = capsys.readouterr().out
    assert f"opd seed 0 was finished before\nrandom seed 0 {begins}\nrandom seed 0 is finished\n" in printed


def test_a_failure_tells_the_others_to_save(tmp_path, monkeypatch):
    monkeypatch.setenv("PACE", "0.1")
    monkeypatch.setenv("FAIL", "random 2")
    monkeypatch.setenv("WHAT", "fail")
    base = replace(BASE, steps=200)
    said = refusal(compare, base, ["opd", "random"], [0], tmp_path / "out", jobs=2, command=COMMAND)
    assert said.startswith("random seed 0 ended with status 1")
    assert (tmp_path / "out" / "opd" / "seed-0" / "saved").exists()
    assert journal(tmp_path, "end") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_lets_the_runs_save(tmp_path, monkeypatch, number):
    monkeypatch.setenv("PACE", "0.1")
    sleep, saw = time.sleep, []

    def sleep_and_interrupt(seconds):
        sleep(seconds)
        if not saw and last_step(tmp_path / "out" / "prune" / "seed-0" / "metrics.jsonl") >= 1:
            saw.append(True)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(time, "sleep", sleep_and_interrupt)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        compare(replace(BASE, steps=200), ["opd", "prune"], [0], tmp_path / "out", jobs=2, command=COMMAND)
    assert (tmp_path / "out" / "opd" / "seed-0" / "saved").exists()
    assert (tmp_path / "out" / "prune" / "seed-0" / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_nohup_lets_it_outlive_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with module.interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_that_does_not_leave_is_killed(monkeypatch):
    monkeypatch.setattr(module, "SAVING_S", 0.2)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    module.stop([module.Child(None, process, None, 0)])
    assert process.returncode == -signal.SIGKILL
    process.stdout.close()


def test_another_run_in_the_folder_is_not_touched(tmp_path):
    folder = tmp_path / "out" / "prune" / "seed-0"
    folder.mkdir(parents=True)
    write_config(replace(BASE, steps=5), folder / "config.yaml")
    said = refusal(compare, BASE, ["opd", "prune"], [0], tmp_path / "out", command=COMMAND)
    assert said == f"the run folder {folder} holds another run: steps is 5 there and 4 here"
    assert not (tmp_path / "journal").exists()
    (tmp_path / "file").touch()
    said = refusal(compare, BASE, ["opd"], [0], tmp_path / "file", command=COMMAND)
    assert said == f"the folder {tmp_path / 'file'} cannot be made: File exists"

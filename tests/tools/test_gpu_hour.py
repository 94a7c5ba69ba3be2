"""`make gpu` where there is no GPU: how it runs its steps, that it says what is missing, the small calls it makes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import _parse as bench_arguments
from scripts import gpu, gpu_small
from scripts.gpu import Step


def python(code, **fields):
    fields = {"name": "step", "seconds": 20} | fields
    return Step(command=(sys.executable, "-c", code), **fields)


def lines(out):
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def test_every_step_runs_whatever_became_of_the_one_before(tmp_path, capsys):
    plan = [
        python("print('one'); raise SystemExit(3)", name="fails"),
        Step("is not there", 20, ("no-such-program",)),
        python("import sys; print('two'); print('three', file=sys.stderr)", name="passes", show=True),
    ]
    outcomes = gpu.run_all(plan, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["FAILED (3)", "LEFT OUT: there is no no-such-program", "passed"]
    assert [line["status"] for line in lines(tmp_path)] == [outcome.status for outcome in outcomes]
    log = (tmp_path / "log.txt").read_text()
    assert "===== fails" in log and "one" in log and "two\n" in log and "three\n" in log
    printed = capsys.readouterr().out
    assert "one" in printed, "the end of what a failed step said"
    assert "two" in printed and "three" in printed, "all that a shown step said"
    assert len(list(tmp_path.iterdir())) <= 7, "and the measurements: no more than eight files"


def test_a_second_try_is_made_only_after_a_failure(tmp_path):
    first, second = python("pass", name="first"), python("pass", name="second", unless="first")
    assert [outcome.step for outcome in gpu.run_all([first, second], tmp_path)] == ["first"]
    failing = python("raise SystemExit(1)", name="first")
    assert [outcome.step for outcome in gpu.run_all([failing, second], tmp_path)] == ["first", "second"]


def test_a_step_that_takes_too_long_ends_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    child = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    (outcome,) = gpu.run_all([python(child, seconds=2)], tmp_path)
    assert outcome.status == "CUT SHORT after 2 s"
    assert time.monotonic() - started < 15
    pid = re.findall(r"^\d+$", (tmp_path / "log.txt").read_text(), re.MULTILINE)[0]
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the step's child is still there")


def test_a_step_that_is_cut_short_may_say_what_it_has_seen(tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    (outcome,) = gpu.run_all([python(code, seconds=2)], tmp_path)
    assert outcome.status == "CUT SHORT after 2 s" and "so far" in (tmp_path / "log.txt").read_text()


def test_steps_leave_time_for_what_matters_more(tmp_path):
    plan = [
        python("import time; time.sleep(60)", name="long", seconds=100, leave=8),
        python("import time; time.sleep(60)", name="no time", seconds=100, leave=8),
        python("pass", name="measurements", seconds=7),
    ]
    outcomes = gpu.run_all(plan, tmp_path, seconds=14)
    assert [outcome.status for outcome in outcomes] == ["CUT SHORT after 6 s", "LEFT OUT: no time is left", "passed"]


def test_a_log_that_is_too_long_loses_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 1000)
    gpu.run_all([python("print('begin'); print('x' * 5000); print('end')")], tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 1200 and "begin" in log and log.endswith("end\n") and "the middle is left out" in log


def test_the_steps_fit_in_the_call_and_measure_even_after_the_slowest_tests(tmp_path):
    steps = gpu.steps(tmp_path, "some-gpu.jsonl")
    names = [step.name for step in steps]
    before = steps[: names.index("measurements")]
    assert {step.unless for step in steps} <= {"", *names}
    assert all(gpu.ALL_SECONDS - step.leave > 5 for step in before) and gpu.ALL_SECONDS <= 480
    assert min(step.leave for step in before) >= 150, "seconds that the measurements have, whatever happens before them"
    assert (
        names.index("build") < names.index("small calls of cuda") < names.index("measurements") < names.index("targets")
    )


def test_the_programs_understand_their_arguments(tmp_path):
    steps = gpu.steps(tmp_path, "some-gpu.jsonl")
    for step in steps:
        if "bench" in step.command:
            options = bench_arguments(step.command[step.command.index("bench") + 1 :])
            assert options.file == tmp_path / "some-gpu.jsonl"
            assert options.command == "check" or options.device == "cuda"
    tests = next(step for step in steps if "pytest" in step.command)
    done = subprocess.run([*tests.command, "--help"], cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be used")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    assert printed.startswith("make gpu must have a GPU that torch can use, got none") and printed.count("\n") == 1


def test_the_small_calls_find_what_is_wrong(capsys, monkeypatch):
    few = [call for call in gpu_small.calls() if call[2][0].shape[-1] < 40000]
    assert {call[1] for call in few} == {
        "reliability",
        "token_stats",
        "reliability_from_topk",
        "reliability_from_drift",
    }
    monkeypatch.setattr(gpu_small, "calls", lambda: iter(few))
    assert gpu_small.main(["cpp", "--device", "cpu"]) == 0
    right = gpu_small.reference.reliability_from_drift
    monkeypatch.setattr(gpu_small.reference, "reliability_from_drift", lambda drift, mask: right(~drift, mask))
    assert gpu_small.main(["cpp", "--device", "cpu"]) == 1
    assert "WRONG cpp reliability_from_drift, drift: drift_count" in capsys.readouterr().out

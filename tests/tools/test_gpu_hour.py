"""`make gpu` without a GPU: how it runs its steps, that it says what is missing, the small calls it makes."""

import json
import sys

from bench.__main__ import _parse as bench_arguments
from scripts import gpu, gpu_small
from scripts.gpu import Step


def python(code, **fields):
    return Step(**{"name": "step", "seconds": 20, "command": (sys.executable, "-c", code)} | fields)


def test_every_step_runs_whatever_became_of_the_one_before(tmp_path, capsys):
    plan = [
        python("print('one'); raise SystemExit(3)", name="fails"),
        python("pass", name="second try", unless="fails"),
        python("raise SystemExit(1)", name="not needed", unless="second try"),
        Step("is not there", 20, ("no-such-program",)),
        python("import sys; print('two'); print('three', file=sys.stderr)", name="passes", show=True),
    ]
    outcomes = gpu.run_all(plan, tmp_path)
    missing = "LEFT OUT: there is no no-such-program"
    assert [outcome.status for outcome in outcomes] == ["FAILED (3)", "passed", missing, "passed"]
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == [outcome.status for outcome in outcomes]
    for text in ((tmp_path / "log.txt").read_text(), capsys.readouterr().out):
        assert "one" in text and "two\n" in text and "three\n" in text, "a failed step's end, all of a shown step"


def test_the_steps_fit_in_the_call_and_their_programs_understand_them(tmp_path):
    steps = gpu.steps(tmp_path, "some-gpu.jsonl")
    names = [step.name for step in steps]
    order = ["build", "small calls of cuda", "measurements", "targets"]
    assert sorted(order, key=names.index) == order and {step.unless for step in steps} <= {"", *names}
    leaves = [step.leave for step in steps[: names.index("measurements")]]
    assert gpu.ALL_SECONDS <= 480 and min(leaves) >= 150, "seconds that the measurements have, whatever happens before"
    for step in steps:
        if "bench" in step.command and "trl" not in step.command:
            options = bench_arguments(step.command[step.command.index("bench") + 1 :])
            assert options.file == tmp_path / "some-gpu.jsonl"
            assert options.command == "check" or options.device == "cuda"


def test_the_small_calls_find_what_is_wrong(capsys, monkeypatch):
    every = [*gpu_small.calls(), *gpu_small.loss_calls()]
    assert {call[1] for call in every} == gpu_small.OPERATORS.keys()
    few = [call for call in every if call[2][0].shape[-1] < 40000]
    monkeypatch.setattr(gpu_small, "calls", lambda: iter(few))
    monkeypatch.setattr(gpu_small, "loss_calls", lambda: ())
    assert gpu_small.main(["cpp", "--device", "cpu"]) == 0
    right = gpu_small.pruneopd_kernels.reliability_from_drift
    monkeypatch.setattr(
        gpu_small.pruneopd_kernels, "reliability_from_drift",
        lambda drift, *rest, impl: right(drift if impl == "reference" else ~drift, *rest, impl=impl),
    )  # fmt: skip
    assert gpu_small.main(["cpp", "--device", "cpu"]) == 1
    assert "WRONG cpp reliability_from_drift, drift: drift_count" in capsys.readouterr().out

"""Two processes that share a run compute the numbers of one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType

from pruneopd_trainer.train import check_processes
from trainer_models import near, random_model, read_lines, refusal, save, write_lines

RANK = Path(__file__).with_name("trainer_rank.py")


def torchrun(size, *command, **environment):
    """Run a command in processes; return what has come of it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=240)


def launch(out, method, size):
    """Run `trainer_rank.py` in processes that know each other."""
    out.mkdir()
    done = torchrun(size, RANK, out, method, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(size)]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["prune", "random"])
def test_two_processes_come_to_the_numbers_of_one(tmp_path, method):
    (alone,) = launch(tmp_path / "one", method, 1)
    first, second = launch(tmp_path / "two", method, 2)
    assert first["rows"] + second["rows"] == alone["rows"]
    assert first["rows"]
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=5e-5)
    for name, value in alone["evaluation"].items():
        assert first["evaluation"][name] == second["evaluation"][name] == pytest.approx(value, rel=1e-4)
    measured = {"time_s", "peak_memory_mib"}
    for one, two, other in zip(alone["records"], first["records"], second["records"], strict=True):
        for name in one.keys() - measured:
            assert two[name] == other[name], name
            if isinstance(one[name], float):
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
            elif name != "method" and not isinstance(one[name], list):
                assert two[name] == one[name], name


@pytest.mark.thorough
def test_the_documented_command(tmp_path):
    """Two processes train and save one run; those that do not know each other are refused."""
    teacher = random_model(1)
    save(tmp_path / "teacher", teacher)
    save(tmp_path / "student", near(teacher, 2, 0.35))
    prompts = write_lines(tmp_path / "prompts.jsonl", *({"prompt": f"{n} + 1 ="} for n in range(20)))
    values = {name: str(tmp_path / name) for name in ("student", "teacher")} | {"data": str(prompts), "steps": 2}
    values |= {
        "k": 4,
        "initial_length": 8,
        "minimum_length": 4,
        "maximum_length": 16,
        "batch_size": 4,
        "eval_prompts": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = "-m", "pruneopd_trainer", "--config", tmp_path / "run.yaml", "--out", tmp_path / "run"
    if not torch.cuda.is_available():
        done = torchrun(2, *command)
        assert "the processes must know each other: without GPUs, set ACCELERATE_USE_CPU=true" in done.stderr
        assert not (tmp_path / "run").exists()
    done = torchrun(2, *command, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [record["step"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "student").is_dir()


def test_a_student_in_parts_is_refused():
    parts = SimpleNamespace(num_processes=2, distributed_type=DistributedType.FSDP)
    rule = "must hold a whole student in each process; for larger ones use TRL or verl (docs/integrations)"
    assert refusal(check_processes, parts) == f"the trainer {rule}, got FSDP"

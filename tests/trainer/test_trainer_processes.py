"""Two processes that share a run compute the numbers of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK = Path(__file__).with_name("trainer_rank.py")


def launch(out, method, size):
    """Run `trainer_rank.py` in processes that know each other, as `accelerate launch` and `torchrun` start them."""
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, RANK, out, method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
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

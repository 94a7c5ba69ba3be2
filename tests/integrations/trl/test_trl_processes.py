"""Two processes under torchrun: the same loss as TRL's, one budget, means over both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(HERE / "rank.py"), str(folder)], capture_output=True, text=True, timeout=300,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("loss", ["reverse_kl", "topk_policy", "divergence"])
def test_without_pruning_a_loss_is_that_of_trl(found, loss):
    expected, got = (found[0]["equality"][name] for name in ("stock", loss))
    assert len(got) == len(expected) == 2
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_hits_are_counted_over_both(found):
    """All on the first process, they are half of all: M grows, and is the same on both."""
    assert [each["budget"] for each in found] == [{"lengths": [10, 12], "sampled_up_to": 12}] * 2


def test_measures_are_means_over_both(found):
    each = [one["measures"] for one in found]
    tokens = sum(one["tokens"] for one in each)
    lengths = each[0]["effective"] + each[1]["effective"]
    assert each[0]["effective"] != each[1]["effective"]
    expected = [sum(one["overlap"] for one in each) / tokens, sum(lengths) / len(lengths)]
    assert each[0]["logged"] == [pytest.approx(expected)]

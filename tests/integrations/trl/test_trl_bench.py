"""The measurement beside TRL's losses, at a size that shows no speed."""

import subprocess
import sys

from bench import results, trl
from pruneopd_kernels import PruneConfig

SMALL = [
    "--positions",
    "32",
    "--hidden",
    "8",
    "--vocabulary",
    "200",
    "--seconds",
    "0",
    "--rounds",
    "1",
    "--device",
    "cpu",
]


def test_a_run_writes_a_row_a_loss(tmp_path):
    file = tmp_path / "trl.jsonl"
    for _ in range(2):  # the second run replaces the rows of the first
        assert trl.main([*SMALL, "--file", str(file)]) == 0
    rows = results.load(file)
    assert [row["loss"] for row in rows] == ["trl", "reverse_kl", "topk_policy", "divergence"]
    assert rows[0]["times_faster_than_trl"] == 1
    assert all(row["median_ms"] > 0 and row["trl"].startswith("1.16") for row in rows)


def test_a_wrong_loss_is_not_timed(monkeypatch, capsys):
    original = trl.step
    monkeypatch.setattr(trl, "step", lambda given, loss, prune: original(given, loss, PruneConfig()))
    assert trl.main(SMALL) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("NOT TIMED: reverse_kl: the loss is ")


def test_without_trl_it_says_so():
    code = "import sys; sys.modules['trl'] = None\nfrom bench import trl\nprint(trl.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "bench.trl: TRL is not installed here, so its losses were not measured\n0\n"

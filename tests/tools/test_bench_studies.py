"""The studies beside the operators, at sizes that show no speed, and their published results."""

import json
import re

import pytest
import torch

import processes
from bench.report import rows as results
from bench.report import tables
from bench.studies import linear, sampled_drift
from bench.studies.linear import Size
from bench.studies.sampled_drift import Drift, agreement, ranking
from pruneopd_kernels import PruneConfig

TINY = Size(positions=32, hidden=8, vocabulary=200)
ARGUMENTS = ["--positions", "32", "--hidden", "8", "--vocabulary", "200", "--seconds", "0", "--rounds", "1"]
ARGUMENTS += ["--threads", "1"]


def test_a_run_saves_a_row_a_case_and_the_page_shows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "measure_memory", lambda size, loss, reduction, threads: 2**20 * len(reduction))
    file = tmp_path / "device.jsonl"
    assert linear.main([*ARGUMENTS, "--file", str(file)]) == 0
    rows = results.load(file)
    assert len(rows) == 6 + 1 + 3
    assert all(row["time_over_products"] > 0 for row in rows[:6]) and rows[6]["time_over_not_skipping"] > 0
    assert tables.linear(file).count("\n| `") == 6
    assert "linear_opd_loss" not in tables.tables(file), "the README's table is of the operators on logits"


def test_a_wrong_answer_is_not_timed(monkeypatch, capsys):
    right = linear.linear_opd_loss

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return out._replace(loss=out.loss * 1.01)

    monkeypatch.setattr(linear, "linear_opd_loss", wrong)
    assert linear.main([*ARGUMENTS, "--no-save"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(re.findall("NOT TIMED: .* is off by", printed.err)) == 3 * 6, "loss and gradients of each case"


@pytest.mark.thorough
def test_several_processes_against_one():
    """The command checks the ranks' answer before it prints a row."""
    arguments = ("parallel", "--shape", 1, 2, "--rounds", 1)
    row = json.loads(processes.run("-m", "bench", *arguments, cwd=processes.ROOT))
    assert row["ranks"] == 2 and row["median_ms"] > 0 and row["bytes_sent_by_a_rank"] == 32 + 2 * 4 * (5 * 16 + 4)


CONFIG = PruneConfig(w_drop=0.25)


def drift(by_overlap, log_ratio, mask=None):
    by_overlap, log_ratio = torch.tensor(by_overlap).bool(), torch.tensor(log_ratio, dtype=torch.float64)
    return Drift(by_overlap, log_ratio, torch.ones_like(by_overlap) if mask is None else torch.tensor(mask).bool())


def test_agreement_counts():
    made = drift([[1, 1, 1], [0, 0, 1]], [[3.0, 0.0, 9.0], [3.0, -2.0, 9.0]], [[1, 1, 0], [1, 1, 0]])
    expected = {"precision": 2 / 3, "recall": 1.0, "accuracy": 0.75, "rate_by_overlap": 0.5, "rate_by_token": 0.75}
    assert {name: agreement(made, -1.0, CONFIG)[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_agreement_along_responses():
    """Half as many drifts at the right places: twice the length, or the same with w_drop scaled."""
    row = agreement(drift([[1] * 16] * 2, [[5.0, 0.0] * 8] * 2), 2.0, CONFIG)
    # R is above 0 for 3 drifts, before the fourth
    assert row["effective_length_ratio"] == pytest.approx(6 / 3, rel=1e-3)
    assert row["scaled_effective_length_ratio"] == pytest.approx(2 / 3, rel=1e-3)
    assert row["count_correlation"] > 0.99
    assert row["effective_length_correlation"] is None  # both responses are alike


def test_equal_drifts_agree_in_all():
    events = (torch.rand(8, 40) < torch.linspace(0.1, 0.9, 8)[:, None]).int().tolist()
    made = drift(events, events)
    row = agreement(made, 0.5, CONFIG)
    for name in ("accuracy", "precision", "recall", "count_correlation", "effective_length_ratio"):
        assert row[name] == pytest.approx(1.0)
    assert row["scaled_weight_difference"] == 0 and ranking(made)["area_under_roc"] == 1
    made = drift(events, torch.randn(8, 40).tolist())
    assert 0.4 < ranking(made)["area_under_roc"] < 0.6
    row = agreement(made, ranking(made)["matching_threshold"], CONFIG)
    assert row["rate_by_token"] == pytest.approx(row["rate_by_overlap"], abs=0.01)


def test_the_page_shows_the_saved_result():
    assert sampled_drift.tables(json.loads(sampled_drift.FILE.read_text())) in sampled_drift.PAGE.read_text()

"""The comparison of both kinds of drift, on drift made here; and what is published of it."""

import json

import pytest
import torch

from bench import sampled_drift
from bench.sampled_drift import Drift, agreement, ranking
from pruneopd_kernels import PruneConfig

CONFIG = PruneConfig(w_drop=0.25)


def drift(by_overlap, log_ratio, mask=None):
    by_overlap, log_ratio = torch.tensor(by_overlap).bool(), torch.tensor(log_ratio, dtype=torch.float64)
    return Drift(by_overlap, log_ratio, torch.ones_like(by_overlap) if mask is None else torch.tensor(mask).bool())


def test_agreement_counts():
    made = drift([[1, 1, 1], [0, 0, 1]], [[3.0, 0.0, 9.0], [3.0, 0.0, 9.0]], [[1, 1, 0], [1, 1, 0]])
    row = agreement(made, 2.0, CONFIG)
    assert row["rate_by_overlap"] == row["rate_by_token"] == row["accuracy"] == row["precision"] == row["recall"] == 0.5
    row = agreement(made, -1.0, CONFIG)
    assert (row["precision"], row["recall"], row["rate_by_token"]) == (0.5, 1.0, 1.0)
    row = agreement(made, 5.0, CONFIG)
    assert (row["precision"], row["recall"], row["accuracy"]) == (0.0, 0.0, 0.5)


def test_agreement_along_responses():
    """Half as many drifts at the right places: twice the length, or the same with w_drop scaled."""
    by_overlap = [[1] * 16, [1] * 16]
    by_token = [[5.0, 0.0] * 8, [5.0, 0.0] * 8]
    row = agreement(drift(by_overlap, by_token), 2.0, CONFIG)
    assert row["effective_length_ratio"] == pytest.approx(
        6 / 3, rel=1e-3
    )  # R is above 0 for 3 drifts, before the fourth
    assert row["scaled_effective_length_ratio"] == pytest.approx(2 / 3, rel=1e-3)
    assert row["count_correlation"] > 0.99
    assert row["effective_length_correlation"] is None  # both responses are alike


def test_equal_drifts_agree_in_all():
    events = (torch.rand(8, 40) < torch.linspace(0.1, 0.9, 8)[:, None]).int().tolist()
    made = drift(events, events)
    row = agreement(made, 0.5, CONFIG)
    expected = {"accuracy", "precision", "recall", "count_correlation", "effective_length_ratio",
                "scaled_effective_length_ratio", "effective_length_correlation"}  # fmt: skip
    assert {name for name, value in row.items() if value == pytest.approx(1.0)} == expected
    assert row["scaled_weight_difference"] == 0
    assert ranking(made)["area_under_roc"] == 1
    mixed = drift(events, torch.rand(8, 40).tolist())
    assert 0.4 < ranking(mixed)["area_under_roc"] < 0.6


def test_the_matching_threshold_matches():
    made = drift((torch.rand(4, 50) < 0.3).int().tolist(), torch.randn(4, 50).tolist())
    row = agreement(made, ranking(made)["matching_threshold"], CONFIG)
    assert row["rate_by_token"] == pytest.approx(row["rate_by_overlap"], abs=0.01)


def test_the_page_shows_the_saved_result(tmp_path):
    saved = json.loads(sampled_drift.FILE.read_text())
    page = sampled_drift.PAGE.read_text()
    assert sampled_drift.tables(saved) in page
    copy = tmp_path / "page.md"
    copy.write_text(page.replace("0.", "9."))
    sampled_drift.write(saved, copy)
    begin, end = sampled_drift.MARKS
    assert copy.read_text().split(begin)[1].split(end)[0] == page.split(begin)[1].split(end)[0]
    assert {student["student"] for student in saved["students"]} == {
        "1 layer removed", "4 layers removed", "10 layers removed"
    }  # fmt: skip

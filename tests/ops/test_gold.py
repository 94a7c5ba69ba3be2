"""The gold itself, held to numbers worked out by hand."""

import math

import numpy as np

import gold
import reliability
import reliability_from_drift

INF, NAN = math.inf, math.nan


def test_order():
    row = np.array([1.0, -0.0, NAN, 3.0, 0.0, -NAN, INF, -INF, 3.0])
    assert gold.top(row, 9).tolist() == [2, 5, 6, 3, 8, 0, 1, 4, 7]


def test_row_statistics():
    p = np.log([0.5, 0.25, 0.25])
    q = np.log([0.25, 0.25, 0.5])
    assert math.isclose(gold.lse(p + 3, 1.0), 3.0)
    assert np.allclose(np.exp(gold.logprobs(p + 3, 1.0)), [0.5, 0.25, 0.25])
    assert np.allclose(np.exp(gold.logprobs(p, 0.5)), [2 / 3, 1 / 6, 1 / 6])  # the squares
    assert math.isclose(gold.entropy(p), 1.5 * math.log(2))
    assert math.isclose(gold.kl(p, q), 0.25 * math.log(2))  # (0.5 - 0.25) ln 2
    assert gold.kl(np.array([0.0, -INF]), np.log([0.5, 0.5])) == math.log(2)
    assert gold.kl(np.log([0.5, 0.5]), np.array([0.0, -INF])) == INF


def test_broken_rows():
    for row, of_lse in [([0, NAN], NAN), ([0, INF], INF), ([-INF, -INF], -INF), ([NAN, INF], NAN)]:
        row = np.array(row)
        assert gold.is_broken(row)
        np.testing.assert_equal(gold.lse(row, 2.0), of_lse)
        assert math.isnan(gold.entropy(gold.logprobs(row, 2.0)))
    assert not gold.is_broken(np.array([-INF, 0.0]))


def test_reliability_of_one_position_by_hand():
    student = np.log([[[0.5, 0.25, 0.125, 0.125]]])
    teacher = np.log([[[0.25, 0.125, 0.125, 0.5]]])
    out, _ = reliability.gold(student, teacher, k=2, w_drop=0.25)
    assert out["topk_ids"].tolist() == [[[0, 1]]]
    assert out["overlap"].tolist() == [[0.5]]  # the teacher's are 3 and 0
    assert out["drift"].tolist() == [[True]]
    assert (out["reliability"], out["weight"], out["effective_length"]) == (0.75, 1.25, 1)
    # w = 2/3, 1/3; log q - log p = -ln 2 for both
    assert np.allclose(out["rewards"], -1.25 * math.log(2) * np.array([2 / 3, 1 / 3]))


def test_nucleus():
    logprobs = np.log([0.6, 0.2, 0.1])
    assert gold.nucleus([7, 5, 3], logprobs, 0.8) == [7, 5]
    assert gold.nucleus([7, 5, 3], logprobs, 0.81) == [7, 5, 3]
    assert gold.nucleus([7, -1, 3], np.array([math.log(0.6), NAN, math.log(0.2)]), 0.8) == [7, 3]
    assert gold.nucleus([7, 5], np.array([math.log(0.9), NAN]), 0.8) == []


def test_scan():
    drift = np.array([[True, True, False, True], [False, True, True, True]])
    mask = np.array([[1, 0, 1, 1], [1, 1, 1, 1]])
    out, _ = reliability_from_drift.gold(drift, mask, w_drop=0.5, drift_count=np.array([0, 1]))
    assert out["drift_count"].tolist() == [[1, 1, 1, 2], [1, 2, 3, 4]]
    assert out["reliability"].tolist() == [[0.5, 0, 0.5, 0], [0.5, 0, 0, 0]]
    assert out["weight"].tolist() == [[1.0, 0, 1.0, 0.5], [1.0, 0.5, 0.5, 0.5]]
    assert out["effective_length"].tolist() == [2, 1]
    flat = drift.reshape(-1), mask.reshape(-1)
    packed, _ = reliability_from_drift.gold(*flat, w_drop=0.5, cu_seqlens=[0, 4, 4, 8])
    assert packed["drift_count"].tolist() == [1, 1, 1, 2, 0, 1, 2, 3]
    assert packed["effective_length"].tolist() == [2, 0, 2]


def test_rewards_of_tokens_without_mass():
    log_p, log_q = np.array([0.0, 0.0, -INF, -INF]), np.array([-INF, 1.0, 0.0, -INF])
    assert gold.candidate_rewards(log_p, log_q, np.full(4, 0.25)).tolist() == [-INF, 0.25, 0.0, 0.0]
    assert gold.candidate_weights(log_p, np.full(4, -INF), "teacher") is None
    assert np.isnan(gold.candidate_rewards(np.array([-INF, 0.0]), np.array([NAN, NAN]), np.ones(2))).all()

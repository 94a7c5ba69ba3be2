"""`PruneConfig`: the paper's defaults, the same rules as those of `reliability`."""

import copy
import dataclasses
import pickle

import pytest

import cases
import comparison
from pruneopd_kernels import PruneConfig, reliability


def test_fields_and_defaults_are_those_of_the_paper():
    defaults = {"k": 16, "threshold": 0.7, "w_drop": 0.01, "w_base": 0.5, "top_p": 0.95, "eps": 1e-8}
    assert dataclasses.asdict(PruneConfig()) == defaults | {"metric": "overlap", "reward_weight": "student"}
    assert PruneConfig(10, 0.5, 0.1, 0.2, 0.9, 1e-3, "top_p", "none") == PruneConfig(
        k=10, threshold=0.5, w_drop=0.1, w_base=0.2, top_p=0.9, eps=1e-3, metric="top_p", reward_weight="none"
    )


def test_it_is_frozen_hashable_and_travels():
    config = PruneConfig(k=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 5
    assert {config: 1}[PruneConfig(k=4)] == 1
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, k=16) == PruneConfig()


def test_it_is_what_reliability_takes():
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    config = PruneConfig(k=7, threshold=0.4, w_drop=0.3, w_base=0.1, reward_weight="teacher")
    expected = reliability(student, teacher, k=7, threshold=0.4, w_drop=0.3, w_base=0.1, reward_weight="teacher")
    result = reliability(student, teacher, **dataclasses.asdict(config))
    assert comparison.differing(result, expected) == []
    defaults = reliability(student, teacher, **dataclasses.asdict(PruneConfig()))
    assert comparison.differing(reliability(student, teacher), defaults) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k must be between 1 and 256, got 0"),
        ({"k": 257}, "k must be between 1 and 256, got 257"),
        ({"threshold": 0.0}, "threshold must be in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
        ({"w_drop": -0.1}, "w_drop must be finite and >= 0, got -0.1"),
        ({"w_base": float("inf")}, "w_base must be finite and >= 0, got inf"),
        ({"eps": -1e-9}, "eps must be finite and >= 0, got -1e-09"),
        ({"metric": "x"}, "metric must be one of 'overlap', 'top_p', got 'x'"),
        ({"reward_weight": "x"}, "reward_weight must be one of 'student', 'teacher', 'none', got 'x'"),
    ],
    ids=str,
)
def test_it_is_validated(change, words):
    with pytest.raises(ValueError) as raised:
        PruneConfig(**change)
    assert str(raised.value) == f"PruneConfig: {words}"
    with pytest.raises(ValueError):
        dataclasses.replace(PruneConfig(), **change)


def test_it_takes_the_ends_of_its_ranges():
    PruneConfig(k=1, threshold=1.0, top_p=1.0, w_drop=0.0, w_base=0.0, eps=0.0)
    PruneConfig(k=256, threshold=5e-324, top_p=5e-324)

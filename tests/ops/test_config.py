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


def test_it_is_frozen_hashable_and_travels():
    config = PruneConfig(k=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 5
    assert {config: 1}[PruneConfig(k=4)] == 1
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_it_is_what_reliability_takes():
    student, teacher, _ = cases.make("random", (cases.F32, cases.F32))
    for given in ({}, {"k": 7, "threshold": 0.4, "w_drop": 0.3, "w_base": 0.1, "reward_weight": "teacher"}):
        result = reliability(student, teacher, **dataclasses.asdict(PruneConfig(**given)))
        assert comparison.differing(result, reliability(student, teacher, **given)) == []


@pytest.mark.parametrize(("change", "words"), [
    ({"k": 0}, "k must be between 1 and 256, got 0"), ({"k": 257}, "k must be between 1 and 256, got 257"),
    ({"threshold": 0.0}, "threshold must be in (0, 1], got 0.0"),  # by the rules of the operators' scalars
])  # fmt: skip
def test_it_is_validated(change, words):
    with pytest.raises(ValueError) as raised:
        PruneConfig(**change)
    assert str(raised.value) == f"PruneConfig: {words}"

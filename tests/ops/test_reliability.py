import pytest
import torch

import cases
from implementations import each_of
from operators import by_position

OP = "reliability"
_, check = by_position(OP)


@each_of(OP)
def test_drift_by_overlap_is_decided_on_the_exact_count(impl):
    """k=10, count=7, threshold=0.7 is not drift; count=6 is."""
    student, teacher = torch.zeros(1, 11, 30), torch.zeros(1, 11, 30)
    student[..., :10] = 1.0
    for shared in range(11):
        teacher[0, shared, 10 - shared : 20 - shared] = 1.0
    result = check(impl, student, teacher, k=10)
    assert result.drift.tolist() == [[shared < 7 for shared in range(11)]]
    assert check(impl, student, teacher, k=10, threshold=1.0).drift.tolist() == [[True] * 10 + [False]]
    assert check(impl, student, teacher, k=10, threshold=1e-300).drift.tolist() == [[True] + [False] * 10]


@each_of(OP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_drift_by_acceptance(impl, dtype):
    """Teacher's probabilities 1/2, 1/4, 1/8, 1/16, 1/16: logits are multiples of ln 2, ids from the top 4, 3, ..."""
    teacher = torch.tensor([-4.0, -4.0, -3.0, -2.0, -1.0]).expand(1, 5, 5).to(dtype)
    kwargs = {
        "metric": "top_p",
        "token_ids": torch.arange(5)[None],
        "k": 4,
        "teacher_temperature": 1 / 0.6931471805599453,
    }
    for top_p, accepted in ((0.4, {4}), (0.6, {4, 3}), (0.9, {4, 3, 2, 0}), (1.0, {4, 3, 2, 0})):
        result = check(impl, teacher, teacher, top_p=top_p, **kwargs)
        assert result.drift.tolist() == [[i not in accepted for i in range(5)]], top_p
    assert check(impl, teacher, teacher, top_p=1.0, **(kwargs | {"k": 5})).drift.sum() == 0


@each_of(OP)
def test_rewards_where_the_weight_is_zero(impl):
    """L = 0: no NaN and no infinity passes; L > 0: both do."""
    student, teacher, _ = cases.make("nan_positive", (cases.F32, cases.F32))
    zero = check(impl, student, teacher, w_drop=1.0, w_base=0.0, threshold=1.0)
    assert (zero.rewards == 0).all()
    assert check(impl, student, teacher, w_drop=1.0, w_base=0.1, threshold=1.0).rewards.isnan().any()
    student, teacher, _ = cases.make("minus_inf_disjoint", (cases.F32, cases.F32))
    assert (check(impl, student, teacher, w_drop=1.0, w_base=0.0, threshold=1.0).rewards == 0).all()
    assert (check(impl, student, teacher).rewards == -torch.inf).any()


@each_of(OP)
def test_no_mass_to_renormalise(impl):
    """The teacher excludes every candidate of the student: no weight, so no reward."""
    student, teacher = torch.zeros(1, 1, 40), torch.zeros(1, 1, 40)
    student[..., 8:], teacher[..., :8] = -torch.inf, -torch.inf
    assert (check(impl, student, teacher, k=8, reward_weight="teacher").rewards == 0).all()
    assert (check(impl, student, teacher, k=8, reward_weight="student").rewards == -torch.inf).all()
    assert (check(impl, student, teacher, k=8, reward_weight="none").rewards == -torch.inf).all()


@each_of(OP)
def test_mass_that_underflows_is_renormalised(impl):
    """The teacher gives the candidates some e**-200 of its mass: weights are relative to it."""
    student, teacher = cases.randn(1, 2, 50, seed=1), cases.randn(1, 2, 50, seed=2)
    student[..., :16] += 20
    teacher[..., 30] += 200
    result = check(impl, student, teacher, reward_weight="teacher")
    assert (result.rewards.sum(-1) < -150).all()

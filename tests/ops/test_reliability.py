import torch

import cases
from implementations import each_of
from operators import by_position

OP = "reliability"
_, check = by_position(OP)


@each_of(OP)
def test_rewards_where_the_weight_is_zero(impl):
    """L = 0: no NaN and no infinity passes; L > 0: both do."""
    for name, value in (("nan_positive", torch.nan), ("minus_inf_disjoint", -torch.inf)):
        student, teacher, _ = cases.make(name, (cases.F32, cases.F32))
        zero, more = (check(impl, student, teacher, w_drop=1.0, w_base=w, threshold=1.0) for w in (0.0, 0.1))
        assert not zero.rewards.any()
        assert torch.isclose(more.rewards, torch.tensor(value), equal_nan=True).any()


@each_of(OP)
def test_no_mass_to_renormalise(impl):
    """The teacher excludes every candidate of the student: no weight, so no reward."""
    student, teacher = torch.zeros(1, 1, 40), torch.zeros(1, 1, 40)
    student[..., 8:], teacher[..., :8] = -torch.inf, -torch.inf
    for reward_weight, reward in (("teacher", 0.0), ("student", -torch.inf), ("none", -torch.inf)):
        assert (check(impl, student, teacher, k=8, reward_weight=reward_weight).rewards == reward).all()


@each_of(OP)
def test_mass_that_underflows_is_renormalised(impl):
    """The teacher gives the candidates some e**-200 of its mass: weights are relative to it."""
    student, teacher = cases.randn(1, 2, 50, seed=1), cases.randn(1, 2, 50, seed=2)
    student[..., :16] += 20
    teacher[..., 30] += 200
    result = check(impl, student, teacher, reward_weight="teacher")
    assert (result.rewards.sum(-1) < -150).all()

"""Rewards over either side's candidates, or both, against the definition one position at a time."""

import inspect

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import cases
import gold
import tiers
from pruneopd_kernels import opd_rewards, reliability, token_stats

INF, NAN = float("inf"), float("nan")
STRATEGIES = ["student", "teacher", "intersection", "union", "symmetric_difference"]
WEIGHTS = ["student", "teacher", "none"]
SIX = list(inspect.signature(opd_rewards).parameters)[:6]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
each_weight = pytest.mark.parametrize("reward_weight", WEIGHTS)


def check(six, mask=None, weight=None, **kwargs):
    result = opd_rewards(*six, mask, weight=weight, **kwargs)
    arrays = [None if x is None else cases.as_float64(x) for x in (*six, mask, weight)]
    ids, rewards, valid = gold.opd_rewards(*arrays, **kwargs)
    on = ... if mask is None else mask != 0
    np.testing.assert_array_equal(result.ids[on], ids[on])
    np.testing.assert_array_equal(result.valid[on], valid[on])
    np.testing.assert_allclose(result.rewards.double(), rewards, rtol=2e-6, atol=1e-6)
    return result


def by_hand():
    """One position: S = 1, 2, 3 and T = 2, 4, 1, with powers of two."""
    student, teacher = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 4, 1]])
    p = {1: 0.5, 2: 0.25, 3: 0.125, 4: 0.0625}
    q = {1: 0.125, 2: 0.5, 3: 0.0625, 4: 0.25}
    of = lambda probabilities, *ids: torch.tensor([[probabilities[i] for i in ids]]).log()  # noqa: E731
    return student, of(p, 1, 2, 3), teacher, of(q, 2, 4, 1), of(q, 1, 2, 3), of(p, 2, 4, 1)


def test_worked_by_hand():
    """In units of ln 2, log q - log p is -2, 1, -1 and 2 for the ids 1, 2, 3 and 4."""
    ids_and_rewards = {
        ("student", "student"): ([1, 2, 3], [-2 * 4 / 7, 2 / 7, -1 / 7]),
        ("teacher", "teacher"): ([2, 4, 1], [4 / 7, 2 * 2 / 7, -2 * 1 / 7]),
        ("intersection", "none"): ([1, 2, 3], [-2 / 2, 1 / 2, 0]),
        ("intersection", "student"): ([1, 2, 3], [-2 * 2 / 3, 1 / 3, 0]),
        ("union", "none"): ([1, 2, 3, 2, 4, 1], [-2 / 4, 1 / 4, -1 / 4, 0, 2 / 4, 0]),
        ("symmetric_difference", "none"): ([1, 2, 3, 2, 4, 1], [0, 0, -1, 0, 2, 0]),
        ("symmetric_difference", "student"): ([1, 2, 3, 2, 4, 1], [0, 0, -0.125, 0, 2 * 0.0625, 0]),
        ("symmetric_difference", "teacher"): ([1, 2, 3, 2, 4, 1], [0, 0, -0.0625, 0, 2 * 0.25, 0]),
    }
    for (strategy, reward_weight), (ids, rewards) in ids_and_rewards.items():
        result = check(by_hand(), strategy=strategy, reward_weight=reward_weight)
        assert result.ids.tolist() == [ids]
        np.testing.assert_allclose(result.rewards, [np.array(rewards) * np.log(2)], rtol=1e-6, atol=1e-7)
        assert result.ids.dtype == torch.int64 and result.valid.dtype == torch.bool


@pytest.mark.parametrize(("strategy", "reward_weight"), tiers.combinations(STRATEGIES, WEIGHTS))
@hypothesis.given(
    seed=st.integers(0, 2**31),
    k=st.sampled_from([1, 2, 5, 16]),
    padding=st.sampled_from([0.0, 0.3, 1.0]),
    infinite=st.sampled_from([0.0, 0.2]),
    masked=st.booleans(),
    weighted=st.booleans(),
)
def test_against_gold(strategy, reward_weight, seed, k, padding, infinite, masked, weighted):
    rng, shape = torch.Generator().manual_seed(seed), (2, 3)

    def ids():
        x = torch.rand(*shape, 2 * k, generator=rng).topk(k).indices
        return torch.where(torch.rand(*shape, k, generator=rng) < padding, -1, x)

    p, q = ((torch.randn(*shape, 2 * k, generator=rng) * 2).log_softmax(-1) for _ in range(2))
    p[torch.rand(p.shape, generator=rng) < infinite] = -INF
    q[torch.rand(q.shape, generator=rng) < infinite] = -INF
    mask = torch.rand(shape, generator=rng) < 0.7 if masked else None
    weight = torch.tensor([[0.0, 1.5, 0.5], [1.0, 0.0, 0.25]]) if weighted else None
    for unused in [mask == 0] * masked + [weight == 0] * weighted:
        p[unused] = NAN
    s, t = ids(), ids()
    of = lambda logprobs, ids: torch.where(ids < 0, NAN, logprobs.gather(-1, ids.clamp(min=0)))  # noqa: E731
    six = (s, of(p, s), t, of(q, t), of(q, s), of(p, t))
    check(six, mask, weight, strategy=strategy, reward_weight=reward_weight)


@pytest.mark.parametrize(
    ("name", "reward_weight"),
    tiers.combinations(
        ["random", "minus_inf_some", "minus_inf_disjoint", "minus_inf_all_but_few", "nan_many", "both_underflow"],
        WEIGHTS,
    ),
)
def test_student_strategy_equals_the_rewards_of_reliability(name, reward_weight):
    student, teacher, _ = cases.make(name, (cases.F32, cases.F32))
    whole, stats = reliability(student, teacher, reward_weight=reward_weight, w_drop=0.2), token_stats(student, teacher)
    assert list(stats._fields[:6]) == SIX
    result = opd_rewards(*stats[:6], reward_weight=reward_weight, weight=whole.weight)
    torch.testing.assert_close(result.rewards, whole.rewards, rtol=5e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(result.ids, whole.topk_ids)
    assert torch.equal(result.valid, stats.student_topk_logprobs != -INF)


@pytest.mark.parametrize(("strategy", "valid"), [
    ("student", [[1, 0, 0, 1]]), ("teacher", [[1, 1, 0, 0]]), ("intersection", [[0, 0, 0, 1]]),
    ("union", [[1, 0, 0, 1, 0, 1, 0, 0]]), ("symmetric_difference", [[1, 0, 0, 0, 0, 1, 0, 0]]),
])  # fmt: skip
def test_empty_slots_are_never_taken(strategy, valid):
    """S = 5, 7 and T = 7, 6. What lies in empty slots matches nothing, whatever their ids and cross tensors."""
    six = dict(zip(SIX, [
        torch.tensor([[5, 6, -1, 7]]), torch.tensor([[-1.0, -INF, NAN, -2.0]]),
        torch.tensor([[7, 6, 5, -1]]), torch.tensor([[-1.0, -3.0, -INF, 0.0]]),
        torch.tensor([[-1.5, -3.0, NAN, -1.0]]), torch.tensor([[-2.0, -4.0, -1.0, NAN]]),
    ], strict=True))  # fmt: skip
    for reward_weight in WEIGHTS:
        result = check(six.values(), strategy=strategy, reward_weight=reward_weight)
        assert result.valid.tolist() == [[bool(x) for x in valid[0]]]
    six["student_topk_ids"][0, 1] = 5  # padded with an id that is there already
    assert torch.equal(opd_rewards(**six, strategy="student").rewards, check(six.values(), strategy="student").rewards)


@each_strategy
def test_a_cross_tensor_is_left_out_if_it_is_not_needed(strategy):
    six = dict(zip(SIX, by_hand(), strict=True))
    expected = opd_rewards(**six, strategy=strategy).rewards
    needed = {"student": SIX[4:5], "teacher": SIX[5:], "intersection": []}.get(strategy, SIX[4:])
    for missing in SIX[4:]:
        others = {name: x for name, x in six.items() if name != missing}
        if missing not in needed:
            assert torch.equal(opd_rewards(**others, strategy=strategy).rewards, expected)
            continue
        words = f"^opd_rewards: {missing} must be given when strategy is '{strategy}', got None$"
        with pytest.raises(ValueError, match=words):
            opd_rewards(**others, strategy=strategy)


@pytest.mark.parametrize(("argument", "value", "words", "error"), [
    ("strategy", "x", f"be one of {', '.join(map(repr, STRATEGIES))}, got 'x'", ValueError),
    ("teacher_topk_ids", torch.zeros(1, 4).long(), "have shape [1, 3], got [1, 4]", ValueError),
    ("student_topk_logprobs", torch.zeros(1, 4), "have shape [1, 3], got [1, 4]", ValueError),
    ("teacher_on_student_logprobs", torch.zeros(2, 3), "have shape [1, 3], got [2, 3]", ValueError),
    ("mask", torch.zeros(2), "have shape [1], got [2]", ValueError),
    ("student_topk_ids", torch.tensor([[1, 2, 1]]), "hold no id twice in a position, got 1", ValueError),
    ("student_topk_ids", torch.zeros(1, 3), "have dtype int32 or int64, got float32", TypeError),
])  # fmt: skip
def test_bad_input(argument, value, words, error):
    with pytest.raises(error) as raised:
        opd_rewards(**dict(zip(SIX, by_hand(), strict=True)) | {argument: value})
    assert str(raised.value) == f"opd_rewards: {argument} must {words}"


def test_any_leading_axes():
    for shape, strategy in zip([(), (0,), (2, 0), (2, 3, 4)], STRATEGIES[1:], strict=True):
        result = check([x[0].expand(*shape, 3) for x in by_hand()], strategy=strategy)
        assert all(x.shape == (*shape, 3 if strategy in STRATEGIES[:3] else 6) for x in result)

"""What each method keeps of the responses, and their length limits."""

from dataclasses import replace

import pytest
import torch

from pruneopd_kernels import reliability_from_drift
from pruneopd_trainer.config import TrainConfig
from pruneopd_trainer.methods import LengthRule, advantages, group_advantages, token_weight
from pruneopd_trainer.scoring import Scores

CONFIG = TrainConfig(w_drop=0.25, initial_length=8, minimum_length=4, maximum_length=20, truncate_length=6,
                     final_length=16, steps=5, length_step=2, margin=2, patience=2)  # fmt: skip


def scores(lengths=(20, 12, 3), columns=20, k=3, seed=0, config=CONFIG):
    """Random scores of responses of the given lengths."""
    torch.manual_seed(seed)
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    drift = (torch.rand(mask.shape) < 0.5) & mask
    along = reliability_from_drift(drift, mask, w_drop=config.w_drop, w_base=config.w_base)
    candidates, rewards = torch.randint(50, (*mask.shape, k)), torch.randn(*mask.shape, k) * mask[..., None]
    return Scores(mask, mask.float(), drift, mask, along.reliability, along.weight, along.effective_length, candidates,
                  rewards, reverse_kl=mask.float(), entropy_gap=mask.float())  # fmt: skip


def test_prefix_grows_linearly_to_its_final_length():
    rule = LengthRule(replace(CONFIG, method="prefix"))
    lengths = [rule.sampled] + [rule.update(torch.tensor([3])) for _ in range(4)]
    assert lengths == [8, 10, 12, 14, 16]


@pytest.mark.parametrize("method", ["prune", "random"])
def test_the_budget_follows_the_hit_ratio_and_random_only_imagines_it(method):
    rule = LengthRule(replace(CONFIG, method=method))
    reliable, not_reliable = torch.tensor([20, 1, 1]), torch.tensor([5, 1, 1])
    assert (rule.sampled, rule.trained) == (8 if method == "prune" else 20, 8)
    assert LengthRule(replace(CONFIG, method=method, budget=False)).sampled == 20
    assert rule.hits(reliable).tolist() == [True, False, False]
    assert [rule.update(reliable), rule.update(not_reliable), rule.update(not_reliable)] == [10, 10, 8]
    assert rule.sampled == (8 if method == "prune" else 20)
    continued = LengthRule(replace(CONFIG, method=method))
    continued.load_state_dict(rule.state_dict())
    assert continued.update(reliable) == rule.update(reliable) == 10


def test_what_each_token_counts():
    s = scores()
    for method in ("opd", "truncate", "prefix"):
        assert torch.equal(token_weight(s, replace(CONFIG, method=method), None), s.mask.float())
    assert torch.equal(token_weight(s, replace(CONFIG, weights=False), None), s.mask.float())
    chosen = torch.rand(s.mask.shape) * 1.5
    assert torch.equal(token_weight(s, replace(CONFIG, method="random"), chosen), torch.where(s.mask, chosen, 0.0))
    given = advantages(s, CONFIG, None, s.candidates[..., 0], None)
    assert torch.equal(given.values, s.weight[..., None] * s.rewards)
    assert torch.equal(given.ids, s.candidates)


def test_group_advantages_compare_responses_to_one_prompt():
    grades = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = group_advantages(grades, 4)
    assert torch.allclose(found[:4], torch.tensor([3.0, -1, -1, -1]) / 3**0.5)
    assert found[4:].tolist() == [0, 0, 0, 0]


def test_prune_grpo_takes_the_grade_where_reliability_has_run_out():
    config = replace(CONFIG, method="prune+grpo", group_size=3, batch_size=3, group_advantage=0.1)
    s = scores()
    tokens = s.candidates[..., 1]
    given = advantages(s, config, None, tokens, torch.tensor([1.0, -2.0, 0.5]))
    exhausted = s.mask & (s.reliability == 0)
    reliable = s.mask & ~exhausted
    assert exhausted.any()
    assert torch.equal(given.ids[..., -1], tokens)
    assert (given.values[..., :-1][exhausted] == 0).all()
    assert torch.equal(given.values[..., :-1][reliable], (s.weight[..., None] * s.rewards)[reliable])
    group = torch.tensor([0.1, -0.2, 0.05])[:, None].expand_as(tokens)
    assert torch.allclose(given.values[..., -1][exhausted], group[exhausted])
    assert (given.values[..., -1][~exhausted] == 0).all()

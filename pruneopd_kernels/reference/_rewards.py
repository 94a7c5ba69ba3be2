"""Rewards of candidates (eq. 11): r[j] = w[j] * (log q[j] - log p[j])."""

from __future__ import annotations

import torch
from torch import Tensor


def candidate_rewards(
    student_logprobs: Tensor, teacher_logprobs: Tensor, valid: Tensor, reward_weight: str, renormalise: bool = True
) -> Tensor:
    """Rewards of the valid candidates on the last axis, 0 elsewhere; the weights renormalised over the valid ones.

    0 where log q == log p (both -inf too), where log p = -inf, and where there is no mass to renormalise; else -inf
    where log q = -inf, however small the weight. NaN where either is NaN.
    """
    a, b = student_logprobs, teacher_logprobs
    log_weights = {"student": a, "teacher": b, "none": torch.zeros_like(a)}[reward_weight]
    log_weights = log_weights.masked_fill(~valid, -torch.inf)
    weights = torch.softmax(log_weights, -1) if renormalise else log_weights.exp()
    no_mass = (log_weights.amax(-1, keepdim=True) == -torch.inf) & renormalise
    rewards = torch.where(b == -torch.inf, -torch.inf, weights * (b - a))
    rewards = rewards.masked_fill((a == b) | (a == -torch.inf) | no_mass, 0.0)
    rewards = rewards.masked_fill(a.isnan() | b.isnan(), torch.nan)
    return rewards.masked_fill(~valid, 0.0)


def weighted(weight: Tensor, rewards: Tensor) -> Tensor:
    """L * r; a weight of 0 silences even a NaN."""
    return torch.where(weight[..., None] == 0, 0.0, weight[..., None] * rewards)

"""How the methods differ: how long responses may be, and how much each token's reward counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from pruneopd_kernels import ResponseBudget

from .config import TrainConfig
from .scoring import Scores


class LengthRule:
    """The most tokens a response may have, step by step.

    `prune` adapts it by the budget M (Algorithm 1, lines 12-19). `random` samples full responses, but follows what M
    would be, since it keeps as much of them as prune would.
    """

    def __init__(self, config: TrainConfig, group: ProcessGroup | None = None) -> None:
        """Start before the first step; with a group, all its processes share one budget."""
        self.config, self.step = config, 1  # the step that is next
        bounds = {name: getattr(config, f"{name}_length") for name in ("initial", "minimum", "maximum")}
        rule = {name: getattr(config, name) for name in ("margin", "hit_ratio", "patience")}
        self.budget = ResponseBudget(**bounds, **rule, step=config.length_step, group=group)

    @property
    def sampled(self) -> int:
        """Return how long the responses of this step may be."""
        is_full = self.config.method in ("opd", "random") or not self.config.budget
        return self.config.maximum_length if is_full else self.trained

    @property
    def trained(self) -> int:
        """Return how far into a response its tokens may be trained on: M."""
        config = self.config
        if config.method in ("random", "prune", "prune+grpo") and config.budget:
            return self.budget.length
        if config.method == "truncate":
            return config.truncate_length
        if config.method == "prefix":
            share = (self.step - 1) / max(config.steps - 1, 1)
            return round(config.initial_length + (config.final_length - config.initial_length) * share)
        return config.maximum_length

    def hits(self, effective_lengths: Tensor) -> Tensor:
        """Return which responses were reliable up to the end of what is trained on, less the margin: `[B]` bool."""
        return effective_lengths.clamp_max(self.trained) >= self.trained - self.config.margin

    def update(self, effective_lengths: Tensor) -> int:
        """Go on to the next step and return its M; `effective_lengths` are E of this process's responses."""
        self.budget.update(effective_lengths.clamp_max(self.budget.length))
        self.step += 1
        return self.trained

    def state_dict(self) -> dict[str, int]:
        """Return what changes from step to step."""
        return {"step": self.step, **self.budget.state_dict()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from what `state_dict` returned."""
        self.step = state["step"]
        self.budget.load_state_dict({name: state[name] for name in ("length", "counter")})


class Advantages(NamedTuple):
    """Arguments of the policy loss."""

    ids: Tensor  # [B, T, m] int64
    values: Tensor  # [B, T, m] float32
    weight: Tensor  # [B, T] float32: the factor of the rewards


def advantages(
    scores: Scores, config: TrainConfig, chosen: Tensor | None, token_ids: Tensor, group: Tensor | None
) -> Advantages:
    """Turn rewards into advantages: `weight * reward` of each candidate.

    `random` needs `chosen`, float32 `[B, T]`: the weights of the positions it keeps. `prune+grpo` needs `group`,
    float32 `[B]`: the group advantage of each response, which is that of its sampled tokens `token_ids`, `[B, T]`.
    """
    weight = token_weight(scores, config, chosen)
    factor = weight[..., None]
    values = torch.where(factor != 0, factor * scores.rewards, 0)  # a position without weight has no say, even if NaN
    if group is None:
        return Advantages(scores.candidates, values, weight)
    exhausted = scores.mask & (scores.reliability <= config.eps)
    of_token = torch.where(exhausted, config.group_advantage * group[:, None], 0)
    ids, values = torch.cat([scores.candidates, token_ids[..., None]], -1), torch.cat([values, of_token[..., None]], -1)
    return Advantages(ids, values, weight)


def token_weight(scores: Scores, config: TrainConfig, chosen: Tensor | None) -> Tensor:
    """Return how much each token's reward counts: float32 `[B, T]`."""
    if config.method == "random":
        assert chosen is not None
        return scores.mask * chosen
    if config.method == "prune+grpo":
        return scores.weight * (scores.reliability > config.eps)
    if config.method == "prune" and config.weights:
        return scores.weight
    return scores.mask.float()


def kept_by_prune(mask: Tensor, length: int) -> Tensor:
    """Return the positions that prune would have sampled with M = `length`: bool `[B, T]`."""
    return mask & (mask.cumsum(1) <= length)


def group_advantages(grades: Tensor, group_size: int) -> Tensor:
    """Return each grade less its group's mean, over the group's standard deviation: `[B]`; 0 if all agree."""
    groups = grades.float().view(-1, group_size)
    spread = groups.std(1, keepdim=True, correction=0)
    return torch.where(spread > 0, (groups - groups.mean(1, keepdim=True)) / spread, 0).flatten()

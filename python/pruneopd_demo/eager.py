"""The same scores in eager PyTorch: the peer that the operators are timed against and held to."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pruneopd_kernels import PruneConfig, Reliability

from .problems import DemoError

TOLERANCES = {"overlap": 0.0, "weight": 1e-6, "rewards": 1e-3}
"""The largest difference that float32 explains; rewards subtract log-probabilities of tens of nats."""


class EagerReliability(NamedTuple):
    """The part of `Reliability` that is compared."""

    overlap: Tensor
    """`[B, T]`."""
    drift_count: Tensor
    """`[B, T]`."""
    weight: Tensor
    """`[B, T]`."""
    rewards: Tensor
    """`[B, T, k]`."""


@torch.no_grad()
def eager_reliability(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, drift_count: Tensor, config: PruneConfig
) -> EagerReliability:
    """What one would write in plain PyTorch for Prune-OPD (arXiv:2605.07804), eq. 6-11."""
    student_ids = student_logits.topk(config.k).indices
    teacher_ids = teacher_logits.topk(config.k).indices
    shared = (student_ids[..., :, None] == teacher_ids[..., None, :]).any(-1)
    overlap = shared.float().mean(-1) * mask

    drift = (overlap < config.threshold) & mask
    count = drift_count[:, None] + drift.cumsum(1)
    weight = ((1 - config.w_drop * count.double()).clamp(0, 1) + config.w_base).float() * mask

    student_logprobs = student_logits.log_softmax(-1).gather(-1, student_ids)
    teacher_logprobs = teacher_logits.log_softmax(-1).gather(-1, student_ids)
    rewards = weight[..., None] * student_logprobs.softmax(-1) * (teacher_logprobs - student_logprobs)
    return EagerReliability(overlap, count.int(), weight, rewards)


@dataclass
class Agreement:
    """How well two ways to score agree, chunk after chunk of the same responses.

    Where the k-th largest logit of a row equals the next one, `torch.topk` takes either: the response is not compared
    from there on, since all that follows may differ.
    """

    untied: Tensor
    """`[B]` bool: the responses that have met no tie yet."""
    positions: int = 0
    """Positions compared."""
    reward_difference: float = 0.0
    """The largest difference of a position's reward, summed over its candidates."""

    def check(self, scored: Reliability, eager: EagerReliability, tied: Tensor, mask: Tensor) -> None:
        """Takes in one chunk, or raises DemoError; `tied` and `mask` are `[B, T]` bool."""
        before_tie = self.untied[:, None] & (tied & mask).cumsum(1).eq(0)
        self.untied, compared = before_tie[:, -1], before_tie & mask
        if not compared.any():
            return
        for name, tolerance in TOLERANCES.items():
            ours, theirs = getattr(scored, name)[compared], getattr(eager, name)[compared]
            if name == "rewards":  # a tie among the candidates changes their order, not their sum
                ours, theirs = ours.sum(-1), theirs.sum(-1)
            difference = float((ours - theirs).abs().max())
            if not difference <= tolerance:  # NaN is no agreement either
                raise DemoError(f"the operators and eager PyTorch disagree: {name} by {difference:.2g}")
        self.positions += int(compared.sum())
        self.reward_difference = max(self.reward_difference, difference)


def ties(logits: Tensor, k: int) -> Tensor:
    """Whether the k-th largest logit of each row equals the next one."""
    if k == logits.shape[-1]:
        return torch.zeros(logits.shape[:-1], dtype=torch.bool)
    values = logits.topk(k + 1).values
    return values[..., k - 1] == values[..., k]

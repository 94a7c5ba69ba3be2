"""The hyperparameters of pruning as one object."""

from __future__ import annotations

from dataclasses import dataclass, fields

from . import checks
from .checks import Metric, RewardWeight


@dataclass(frozen=True)
class PruneConfig:
    """Hyperparameters of `reliability`, validated; the defaults are the paper's.

    Args:
        k: Candidates per position, 1 to 256.
        threshold: A position drifts where its overlap is below this, in (0, 1] (eq. 7).
        w_drop: Reliability lost with each drift, >= 0 (eq. 9).
        w_base: What is added to the reliability to give the weight, >= 0 (eq. 10).
        top_p: Mass of the teacher's nucleus, in (0, 1] (eq. 14); used with `metric="top_p"`.
        eps: A position counts towards the effective length where its reliability exceeds this, >= 0 (eq. 12).
        metric: `"overlap"` (eq. 7) or `"top_p"` (eq. 14-16) decides about drift.
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.

    Raises:
        ValueError: A value is outside of its range.
        TypeError: A value is of another type.

    Examples:
        >>> from dataclasses import asdict
        >>> import torch
        >>> from pruneopd_kernels import PruneConfig, reliability
        >>> config = PruneConfig(k=8, w_drop=0.02)
        >>> logits = torch.randn(1, 3, 50)
        >>> reliability(logits, logits, **asdict(config)).overlap
        tensor([[1., 1., 1.]])
    """

    k: int = 16
    threshold: float = 0.7
    w_drop: float = 0.01
    w_base: float = 0.5
    top_p: float = 0.95
    eps: float = 1e-8
    metric: Metric = "overlap"
    reward_weight: RewardWeight = "student"

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in fields(self):
            checks.kind(name, field.name, getattr(self, field.name), checks.KINDS[str(field.type)])
        checks.between(name, "k", self.k, 1, checks.MAX_K)
        checks.scalars(name, self)

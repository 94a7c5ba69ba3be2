"""What the operators return: tensors from the torch functions, NumPy arrays of the same dtypes from `host`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Reliability(NamedTuple):
    """Of `reliability`. Per position means `[B, T]`, or `[N]` where responses are packed."""

    overlap: Tensor
    """float32 per position: O, the common share of both top-k (eq. 6)."""
    drift: Tensor
    """bool per position: B, whether the position drifts (eq. 7, or 14-16)."""
    drift_count: Tensor
    """int32 per position: C, how many positions of the response have drifted so far (eq. 8)."""
    reliability: Tensor
    """float32 per position: R, in [0, 1] (eq. 9)."""
    weight: Tensor
    """float32 per position: L, what the rewards are weighted by (eq. 10)."""
    effective_length: Tensor
    """int32 `[B]`: E, the number of positions that are still reliable (eq. 12)."""
    topk_ids: Tensor
    """int64 `[..., k]`: the student's candidates in order."""
    rewards: Tensor
    """float32 `[..., k]`: of those candidates, weighted by L (eq. 11)."""


class ReliabilityFromTopk(NamedTuple):
    """Of `reliability_from_topk`: those fields of `Reliability` that need no logits."""

    overlap: Tensor
    drift: Tensor
    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor


class ReliabilityFromDrift(NamedTuple):
    """Of `reliability_from_drift`: those fields of `Reliability` that follow from the drift alone."""

    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor


class TokenStats(NamedTuple):
    """Of `token_stats`. Per position means the leading axes of the logits; lse, entropy and KL are in nats."""

    student_topk_ids: Tensor
    """int64 `[..., k]`: the student's candidates in order."""
    student_topk_logprobs: Tensor
    """float32 `[..., k]`: the student's log-probabilities of them."""
    teacher_topk_ids: Tensor
    """int64 `[..., k]`: the teacher's candidates in order."""
    teacher_topk_logprobs: Tensor
    """float32 `[..., k]`: the teacher's log-probabilities of them."""
    teacher_on_student_logprobs: Tensor
    """float32 `[..., k]`: the teacher's log-probabilities of the student's candidates."""
    student_on_teacher_logprobs: Tensor
    """float32 `[..., k]`: the student's log-probabilities of the teacher's candidates."""
    overlap: Tensor
    """float32 per position: O, the common share of both top-k (eq. 6)."""
    student_lse: Tensor
    """float32 per position: log-sum-exp of the student's logits over its temperature."""
    teacher_lse: Tensor
    """float32 per position: log-sum-exp of the teacher's logits over its temperature."""
    student_entropy: Tensor
    """float32 per position: entropy of the student's distribution."""
    teacher_entropy: Tensor
    """float32 per position: entropy of the teacher's distribution."""
    reverse_kl: Tensor
    """float32 per position: KL(student || teacher)."""
    forward_kl: Tensor
    """float32 per position: KL(teacher || student)."""
    student_token_logprob: Tensor
    """float32 per position: the student's log-probability of the token; NaN where there is none."""
    teacher_token_logprob: Tensor
    """float32 per position: the teacher's log-probability of the token; NaN where there is none."""


class TopkForwardKl(NamedTuple):
    """Of `topk_forward_kl`. Per position means the leading axes of the logits."""

    loss: Tensor
    """float32 per position: the sum of q (log q - log p) over the teacher's candidates; differentiable."""
    student_mass: Tensor
    """float32 per position: the student's probability of all the teacher's candidates together."""
    teacher_mass: Tensor
    """float32 per position: the teacher's."""
    overlap: Tensor
    """float32 per position: the share of the student's own k candidates that are among the teacher's (eq. 6)."""
    overlap_token_advantage: Tensor
    """float32 per position: the mean of -q (log q - log p) over the candidates of both; 0 where there is none."""
    student_topk_ids: Tensor
    """int64 `[..., k]`: the student's candidates in order."""


class LinearOpdLoss(NamedTuple):
    """Of `linear_opd_loss`: a loss, and then the fields of `Reliability`."""

    loss: Tensor
    """float32 per position, or 0-d for `reduction="sum"`: weighted by L; differentiable."""
    entropy: Tensor
    """float32 per position: of the student's distribution, in nats."""
    overlap: Tensor
    drift: Tensor
    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor
    topk_ids: Tensor
    rewards: Tensor


class OpdRewards(NamedTuple):
    """Of `opd_rewards`. The number of candidates m is k, or 2k where the strategy takes both sides."""

    ids: Tensor
    """int64 `[..., m]`: the candidates."""
    rewards: Tensor
    """float `[..., m]`: their rewards, 0 where not valid."""
    valid: Tensor
    """bool `[..., m]`: whether the strategy takes the candidate."""

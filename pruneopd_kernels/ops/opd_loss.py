"""`opd_loss`: scoring and loss of a training step in one operator, fused with the gradient."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any, NamedTuple

from .. import checks
from ..checks import Metric, PolicyLoss, RewardWeight
from ..config import PruneConfig
from . import reliability
from ._operator import Impl, Tensor, forward_pass, operator
from .reverse_kl import through_divergence
from .row_stats import through_logprobs


@operator
def opd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    loss: PolicyLoss = "topk_policy",
    entropies: bool = False,
    k: int = PruneConfig.k,
    threshold: float = PruneConfig.threshold,
    w_drop: float = PruneConfig.w_drop,
    w_base: float = PruneConfig.w_base,
    eps: float = PruneConfig.eps,
    metric: Metric = PruneConfig.metric,
    top_p: float = PruneConfig.top_p,
    reward_weight: RewardWeight = PruneConfig.reward_weight,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> OpdLoss:
    """Score responses as `reliability` does, and compute their loss from the same read of the logits.

    With L, r and the other symbols of `reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12)

        loss = -sum(L * r[j])                     loss="topk_policy"
        loss = L * KL(student || teacher)         loss="reverse_kl"

    The first is `topk_policy_loss` with advantages L * r at the policy that sampled the responses: every ratio is 1,
    and the gradient is that of -sum(L * r * log p) with L and r constant. `weight` takes the place of L in the loss and
    in `rewards`.

    A training step reads the student's logits twice, once forward and once backward, the teacher's once (twice for
    `"reverse_kl"`), and writes the gradient once. Results equal those of `reliability` followed by the loss: ids, drift
    and counts bit for bit. Where the weight is 0, loss and gradient are 0. Where a loss is not finite, the gradient is
    NaN for every id. Arguments that `reliability` has, too, mean the same.

    Args:
        token_ids: int32 or int64 `[B, T]` or `[N]`, the response's tokens, for `accepted`; for `metric="top_p"` in
            `[0, vocab_size)` where valid.
        weight: float `[B, T]` or `[N]`: what multiplies rewards and loss. None: L.
        loss: `"topk_policy"` or `"reverse_kl"`.
        entropies: Whether to compute both entropies and `reverse_kl`, from the same read; else they are 0.
        vocab_size: Only ids below it exist, for the candidates and for the softmax; required where the last axes
            differ. Ids from it on get a gradient of 0. None: V.

    Returns:
        The fields of `OpdLoss`. `loss` is differentiable in `student_logits` alone, once; the gradient has the logits'
        dtype. `reverse_kl` is also computed with `loss="reverse_kl"`.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import opd_loss
        >>> student = torch.tensor([[[0.0, 2.0, 1.0]]], requires_grad=True)
        >>> out = opd_loss(student, torch.tensor([[[1.0, 2.0, 0.0]]]), k=2, threshold=0.5)
        >>> out.loss.detach(), out.weight
        (tensor([[0.4034]]), tensor([[1.5000]]))
        >>> out.loss.sum().backward()
        >>> student.grad
        tensor([[[-0.0363, -0.2684,  0.3047]]])
    """
    ...


class OpdLoss(NamedTuple):
    """Of `opd_loss`: the loss, the fields of `Reliability`, and more per position."""

    loss: Tensor
    """float32 per position, differentiable in the student's logits."""
    overlap: Tensor
    drift: Tensor
    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    """float32 per position: L, even if another weight is given (eq. 10)."""
    effective_length: Tensor
    topk_ids: Tensor
    rewards: Tensor
    """float32 `[..., k]`: of the candidates, multiplied by the weight (eq. 11)."""
    accepted: Tensor
    """bool per position: whether the token lies in the teacher's nucleus; False without tokens (eq. 14-16)."""
    student_entropy: Tensor
    """float32 per position, in nats; 0 unless asked for."""
    teacher_entropy: Tensor
    """float32 per position, in nats; 0 unless asked for."""
    reverse_kl: Tensor
    """float32 per position: KL(student || teacher), in nats; 0 unless asked for or needed by the loss."""


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    checks.has_one_for_each(op, "weight", a.weight, a.student_logits, a.student_logits.shape[:-1])
    checks.one_of(op, "loss", a.loss, checks.POLICY_LOSSES)
    reliability.check(op, a, float64=float64, values=values)


SAVED = ("state", "factor")  # both rows' softmax and what is left of KL; what multiplies KL in the loss


def kept(a: Any) -> tuple[str, ...]:
    if a.loss == "reverse_kl":
        return "student_logits", "teacher_logits", *SAVED
    return "student_logits", "topk_ids", "rewards", "state"


def fake(a: Any, empty: Any) -> Any:
    floats = [empty("logits") for _ in range(4)]
    scores = reliability.fake(a, empty)
    return floats[0], *scores, empty("bool"), *floats[1:], empty("float64", 5), empty("float64")


def compute(a: Any, run: Any) -> tuple[Tensor, ...]:
    from .. import formulas

    arguments = a._asdict()
    entropies, divergence = arguments.pop("entropies"), arguments.pop("loss") == "reverse_kl"
    scores = run("opd_scores", **arguments, entropies=entropies, divergence=divergence)
    dtype, state = scores.rewards.dtype, scores.state
    factor = formulas.loss_factor(scores.weight if a.weight is None else a.weight, a.mask, scores.weight)
    if divergence:
        loss = formulas.weighted(factor, scores.reverse_kl).to(dtype)
        state = formulas.spoilt_state(state, loss)
    else:
        loss = _policy_loss(scores.rewards)
    return loss, *scores[:-2], scores.reverse_kl.to(dtype), state, factor


def backward(a: Any, gradient: Tensor) -> Tensor:
    from .. import formulas

    if a.loss == "reverse_kl":
        return through_divergence(formulas.flowing(a.factor, gradient), a)
    spoilt = ~_policy_loss(a.rewards).isfinite()  # a sum of finite rewards may not be finite
    return through_logprobs(gradient, a, a.topk_ids, (-a.rewards).masked_fill(spoilt[..., None], math.nan))


def _policy_loss(rewards: Tensor) -> Tensor:
    return -rewards.double().sum(-1).to(rewards.dtype)


@forward_pass
def opd_scores(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    *,
    k: int,
    threshold: float,
    w_drop: float,
    w_base: float,
    eps: float,
    metric: Metric,
    top_p: float,
    reward_weight: RewardWeight,
    student_temperature: float,
    teacher_temperature: float,
    vocab_size: int | None,
    entropies: bool,
    divergence: bool,
) -> OpdScores:
    """Compute what `reliability` does, from the same kernel, and on request entropies and KL from the same read."""
    ...


# The fields of `OpdLoss` without the loss, `reverse_kl` in float64; and `state`, float64 `[..., 5]`, which `reverse_kl`
# saves, too. Without `divergence` it has only the student's reference and mass.
OpdScores: Any = namedtuple("OpdScores", (*OpdLoss._fields[1:], "state"))  # type: ignore[misc]

"""What is computed from one chunk's logits: reliability, entropy, the loss and its gradient by the logits.

`a` is the record of all arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch.registration import OPS
from ..formulas import weighted
from ..ops import Reliability, TopkForwardKl, reliability, reliability_from_topk, token_stats
from ..ops._operator import run_backward
from ..rewards import opd_rewards
from ._declaration import options


class Terms(NamedTuple):
    """A chunk's losses, and what their gradient is formed from: some floats per position."""

    loss: Tensor  # [c], weighted
    weight: Tensor  # [c]: multiplies the gradient that follows from the other fields
    state: Tensor  # [c, 2] or [c, 5]: defines the softmax
    ids: Tensor | None = None  # [c, m]: candidates; None for a loss over the whole vocabulary
    coefficients: Tensor | None = None  # [c, m]: derivatives by their log-probabilities


class Scored(NamedTuple):
    reliability: Reliability  # of the chunk's positions
    entropy: Tensor | None = None  # [c]: the student's
    terms: Terms | None = None


def score(student: Tensor, teacher: Tensor, a: Any, **along: Any) -> Scored:
    """Score a chunk from both sides' logits; with a loss, if the arguments name one."""
    scored = reliability(student, teacher, **along, **options("reliability", a))
    loss = getattr(a, "loss", None)
    if loss is None:
        return Scored(scored)
    if loss == "topk_forward_kl":
        stats = token_stats(student, teacher, **options("token_stats", a))
        terms, _ = _forward_kl(student, stats.teacher_topk_ids, stats.teacher_topk_logprobs, a)
        return Scored(scored, stats.student_entropy, _with_weight(terms, scored.weight))
    if loss == "topk_policy":
        value, coefficients, state = OPS._topk_policy_loss(
            student, scored.topk_ids, scored.rewards, **options("topk_policy_loss", a)
        )
        terms = Terms(value, torch.ones_like(value), state, scored.topk_ids, coefficients)
    else:
        value, state = OPS._reverse_kl(student, teacher, weight=scored.weight, **options("reverse_kl", a))
        terms = Terms(value, scored.weight, state)
    return Scored(scored, _stats_of(student, a, k=1).student_entropy, terms)


def score_candidates(student: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, a: Any, **along: Any) -> Scored:
    """Score a chunk from the student's logits and the candidates that the teacher's server sent."""
    terms, outputs = _forward_kl(student, teacher_ids, teacher_logprobs, a)
    broken = outputs.student_mass.isnan()[..., None]
    scored = reliability_from_topk(
        # A row without a softmax agrees with nothing and accepts nothing.
        outputs.student_topk_ids.masked_fill(broken, -1),
        teacher_ids.masked_fill(broken, -1),
        teacher_topk_logprobs=teacher_logprobs,
        **along,
        **options("reliability_from_topk", a),
    )
    stats = _stats_of(student, a)
    rewards = opd_rewards(
        stats.student_topk_ids,
        stats.student_topk_logprobs,
        teacher_ids,
        teacher_logprobs,
        strategy="intersection",
        reward_weight=a.reward_weight,
        weight=scored.weight,
    ).rewards
    full = Reliability(*scored, topk_ids=outputs.student_topk_ids, rewards=rewards)
    return Scored(full, stats.student_entropy, _with_weight(terms, scored.weight))


def logits_gradient(terms: Terms, scale: Tensor, student: Tensor, teacher: Tensor | None, a: Any) -> Tensor:
    """Return the gradient of `sum(scale * loss)` by the student's logits."""
    scale = weighted(terms.weight, scale.to(terms.state.dtype))
    if terms.ids is None:
        gradient = run_backward("reverse_kl_backward", a, student, teacher, terms.state, scale)
    else:
        gradient = run_backward("logprobs_backward", a, student, terms.ids, terms.coefficients, terms.state, scale)
    return gradient


def _with_weight(terms: Terms, weight: Tensor) -> Terms:
    weight = weight.to(terms.loss.dtype)
    return terms._replace(loss=weighted(weight, terms.loss), weight=weight)


def _forward_kl(student: Tensor, ids: Tensor, logprobs: Tensor, a: Any) -> tuple[Terms, TopkForwardKl]:
    *outputs, coefficients, state = OPS._topk_forward_kl(student, ids, logprobs, **options("topk_forward_kl", a))
    fields = TopkForwardKl(*outputs)
    return Terms(fields.loss, torch.ones_like(fields.loss), state, ids, coefficients), fields


def _stats_of(student: Tensor, a: Any, **changes: Any) -> Any:
    """Return the student's statistics against itself: the second read of its logits comes from a cache."""
    twice = {"teacher_temperature": a.student_temperature}
    return token_stats(student, student, **options("token_stats", a) | twice | changes)

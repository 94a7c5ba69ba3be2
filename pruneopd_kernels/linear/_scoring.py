"""What is done with one chunk's logits: reliability, entropy, the loss, and the gradient of the loss by the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Reliability, TopkForwardKl, reliability, reliability_from_topk, token_stats
from ..ops._registration import OPS
from ..rewards import opd_rewards

Arguments = dict[str, Any]  # the scalars of `reliability`, `impl` included
_STUDENT = ("student_temperature", "vocab_size", "impl")
_BOTH = (*_STUDENT, "teacher_temperature")
_ALONG = ("threshold", "w_drop", "w_base", "eps", "metric", "top_p", "impl")


class Terms(NamedTuple):
    """A chunk's losses, and what their gradient is formed from: some floats a position."""

    loss: Tensor  # [c], weighted
    weight: Tensor  # [c]: what the gradient that follows from the rest is multiplied by
    state: Tensor  # [c, 2] or [c, 4]: what tells the softmax
    ids: Tensor | None = None  # [c, m]: candidates; none for a loss over the whole vocabulary
    coefficients: Tensor | None = None  # [c, m]: derivatives by their log-probabilities


class Scored(NamedTuple):
    reliability: Reliability  # of the chunk's positions
    entropy: Tensor | None = None  # [c]: the student's
    terms: Terms | None = None


def terms_of(loss: str, student: Tensor, teacher: Tensor, scored: Reliability, arguments: Arguments) -> Scored:
    """The loss from both sides' logits."""
    if loss == "topk_forward_kl":
        stats = token_stats(student, teacher, k=arguments["k"], **_only(_BOTH, arguments))
        terms, _ = _forward_kl(student, stats.teacher_topk_ids, stats.teacher_topk_logprobs, arguments)
        return Scored(scored, stats.student_entropy, weighted(terms, scored.weight))
    if loss == "topk_policy":
        value, coefficients, state = OPS._topk_policy_loss(
            student, scored.topk_ids, scored.rewards, **_only(_STUDENT, arguments)
        )
        terms = Terms(value, torch.ones_like(value), state, scored.topk_ids, coefficients)
    else:
        value, state = OPS._reverse_kl(student, teacher, weight=scored.weight, **_only(_BOTH, arguments))
        terms = Terms(value, scored.weight, state)
    return Scored(scored, _entropy(student, arguments), terms)


def score_candidates(
    student: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, arguments: Arguments, **along: Any
) -> Scored:
    """All there is where a server sends the teacher's candidates instead of its logits."""
    terms, outputs = _forward_kl(student, teacher_ids, teacher_logprobs, arguments)
    broken = outputs.student_mass.isnan()[..., None]
    scored = reliability_from_topk(
        # A row without a softmax agrees with nothing and accepts nothing.
        outputs.student_topk_ids.masked_fill(broken, -1),
        teacher_ids.masked_fill(broken, -1),
        teacher_topk_logprobs=teacher_logprobs,
        **along,
        **_only(_ALONG, arguments),
    )
    stats = token_stats(student, student, k=arguments["k"], **_only_student_twice(arguments))
    rewards = opd_rewards(
        stats.student_topk_ids,
        stats.student_topk_logprobs,
        teacher_ids,
        teacher_logprobs,
        strategy="intersection",
        reward_weight=arguments["reward_weight"],
        weight=scored.weight,
    ).rewards
    full = Reliability(*scored, topk_ids=outputs.student_topk_ids, rewards=rewards)
    return Scored(full, stats.student_entropy, weighted(terms, scored.weight))


def score_logits(student: Tensor, teacher: Tensor, arguments: Arguments, **along: Any) -> Reliability:
    return reliability(student, teacher, **along, **arguments)


def logits_gradient(
    terms: Terms, scale: Tensor, student: Tensor, teacher: Tensor | None, arguments: Arguments
) -> Tensor:
    """The gradient by the student's logits of `sum(scale * loss)`; teacher's logits for a loss over the vocabulary."""
    scale = torch.where(terms.weight == 0, 0.0, scale.to(terms.state.dtype) * terms.weight)
    if terms.ids is None:
        return OPS._reverse_kl_backward(  # type: ignore[no-any-return]
            student, teacher, terms.state, scale, **_only(_BOTH, arguments)
        )
    return OPS._logprobs_backward(  # type: ignore[no-any-return]
        student, terms.ids, terms.coefficients, terms.state, scale, **_only(_STUDENT, arguments)
    )


def weighted(terms: Terms, weight: Tensor) -> Terms:
    """With L; a weight of 0 silences even a NaN."""
    weight = weight.to(terms.loss.dtype)
    return terms._replace(loss=torch.where(weight == 0, 0.0, weight * terms.loss), weight=weight)


def _forward_kl(student: Tensor, ids: Tensor, logprobs: Tensor, arguments: Arguments) -> tuple[Terms, Any]:
    *outputs, coefficients, state = OPS._topk_forward_kl(student, ids, logprobs, **_only(_STUDENT, arguments))
    fields = TopkForwardKl(*outputs)
    return Terms(fields.loss, torch.ones_like(fields.loss), state, ids, coefficients), fields


def _entropy(student: Tensor, arguments: Arguments) -> Tensor:
    """Of the student against itself, for what of the second reading comes out of a cache costs little."""
    return token_stats(student, student, k=1, **_only_student_twice(arguments)).student_entropy


def _only_student_twice(arguments: Arguments) -> Arguments:
    student = _only(_STUDENT, arguments)
    return student | {"teacher_temperature": student["student_temperature"]}


def _only(names: tuple[str, ...], arguments: Arguments) -> Arguments:
    return {name: arguments[name] for name in names}

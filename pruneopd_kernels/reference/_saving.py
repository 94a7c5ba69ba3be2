"""The losses in two passes, as `torch.ops.pruneopd` runs them: what the first saves, and the gradient from that.

Each takes a record of arguments. What is saved is float64: `coefficients`, the derivatives of the
loss by the log-probabilities of the candidates, NaN where the loss is not finite, and `state`, which tells the softmax
of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import (
    candidate_logprobs,
    float_type,
    forward_terms,
    kl_divergence,
    measures_of,
    policy_positions,
    policy_terms,
    read_rows,
    row_state,
    valid_positions,
    weighted_loss,
    weighted_positions,
    where_finite,
)
from ..formulas import topk_ids as first_ids


def topk_policy_loss(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, coefficients `[..., m]`, state `[..., 2]`: reference and mass."""
    used = policy_positions(a.topk_ids, a.advantages, a.mask)
    rows = read_rows(a.student_logits, used, a.vocab_size, a.student_temperature)
    logprobs = candidate_logprobs(rows.logprobs, a.topk_ids)
    terms, derivatives = policy_terms(
        logprobs, a.topk_ids, a.advantages, a.old_logprobs, a.clip_low, a.clip_high, a.clip_dual
    )
    dtype = float_type(a.student_logits)
    loss = torch.where(used, terms.sum(-1), 0.0).to(dtype)
    coefficients = torch.where(used[..., None], derivatives, 0.0)
    return loss, where_finite(loss, coefficients), torch.stack(row_state(rows, used), -1)


def topk_forward_kl(a: Any) -> tuple[Tensor, ...]:
    """The outputs, coefficients `[..., k]`, state `[..., 2]`: reference and mass."""
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    rows = read_rows(a.student_logits, valid, a.vocab_size, a.student_temperature)
    student_topk_ids = first_ids(rows.logits, a.teacher_topk_ids.shape[-1])
    logprobs = candidate_logprobs(rows.logprobs, a.teacher_topk_ids)
    terms = forward_terms(logprobs, rows.broken, a.teacher_topk_ids, a.teacher_topk_logprobs, a.logprob_min)
    measures = measures_of(student_topk_ids, rows.broken, terms, a.teacher_topk_ids, valid)
    dtype = float_type(a.student_logits)
    loss = torch.where(valid, terms.terms.sum(-1), 0.0).to(dtype)
    coefficients = torch.where(valid[..., None], terms.derivatives, 0.0)
    return (
        loss,
        *(x.to(torch.float32 if name == "overlap" else dtype) for name, x in measures._asdict().items()),
        student_topk_ids,
        where_finite(loss, coefficients),
        torch.stack(row_state(rows, valid), -1),
    )


def reverse_kl(a: Any) -> tuple[Tensor, Tensor]:
    """Loss, state `[..., 5]`: the student's reference and mass, the teacher's reference, offset, the peak's excess.

    With the excess of an id log p - log q - KL, the offset is what is left of it where both logits are at their
    references: KL + log(the masses' ratio), NaN where the loss is not finite. The peak is the student's reference.
    """
    used = weighted_positions(a.student_logits, a.mask, a.weight)
    student = read_rows(a.student_logits, used, a.vocab_size, a.student_temperature)
    teacher = read_rows(a.teacher_logits, used, a.vocab_size, a.teacher_temperature)
    dtype = float_type(a.student_logits, a.teacher_logits)
    kl = kl_divergence(student, teacher)
    loss = weighted_loss(kl, a.weight, used).to(dtype)
    reference, mass = row_state(student, used)
    teacher_reference, teacher_mass = row_state(teacher, used)
    offset = torch.where(used, kl + mass.log() - teacher_mass.log(), 0.0).masked_fill(~loss.isfinite(), torch.nan)
    peak = student.logits.argmax(-1, keepdim=True)
    of_peak = (student.logprobs - teacher.logprobs).gather(-1, peak)[..., 0] - kl
    excess = torch.where(used, of_peak, 0.0)
    return loss, torch.stack([reference, mass, teacher_reference, offset, excess], -1)


def logprobs_backward(a: Any) -> tuple[Tensor]:
    """The gradient of `scale * sum(coefficients * log p[topk_ids])`.

    Candidates below 0 or beyond the vocabulary have a part in the sum, and no logit here.
    """
    size = a.vocab_size or a.student_logits.shape[-1]
    used = (a.scale != 0) & (a.coefficients != 0).any(-1)
    coefficients, scale = a.coefficients.to(torch.float64), a.scale.to(torch.float64)
    p = _probabilities(a.student_logits, a.state, used, size, a.student_temperature)
    gradient = -p * coefficients.sum(-1, keepdim=True)
    exists = (a.topk_ids >= 0) & (a.topk_ids < size)
    ids = torch.where(exists, a.topk_ids.to(torch.int64), 0)
    gradient = gradient.scatter_add(-1, ids, torch.where(exists, coefficients, 0.0))
    return (_full_width(a.student_logits, gradient * (scale / a.student_temperature)[..., None], used),)


def reverse_kl_backward(a: Any) -> tuple[Tensor]:
    """The gradient of `scale * KL(p || q)`."""
    size = a.vocab_size or a.student_logits.shape[-1]
    used = a.scale != 0
    reference, mass, teacher_reference, offset, of_peak = (x[..., None] for x in a.state.to(torch.float64).unbind(-1))
    p = _probabilities(a.student_logits, a.state, used, size, a.student_temperature)
    x, y = (logits[..., :size].to(torch.float64) for logits in (a.student_logits, a.teacher_logits))
    excess = (x - reference) / a.student_temperature - (y - teacher_reference) / a.teacher_temperature - offset
    # Where it has most of the mass its excess is the sum of many that are next to nothing: float32 could not tell it.
    excess = torch.where((mass < 1.5) & (x == reference) & ~offset.isnan(), of_peak, excess)
    gradient = torch.where((p == 0) & ~offset.isnan(), 0.0, p * excess)
    scale = a.scale.to(torch.float64) / a.student_temperature
    return (_full_width(a.student_logits, gradient * scale[..., None], used),)


def _probabilities(logits: Tensor, state: Tensor, used: Tensor, size: int, temperature: float) -> Tensor:
    reference, mass = state[..., :1].to(torch.float64), state[..., 1:2].to(torch.float64)
    x = torch.where(used[..., None], logits[..., :size].to(torch.float64), 0.0)
    return ((x - reference) / temperature).exp() / mass


def _full_width(logits: Tensor, gradient: Tensor, used: Tensor) -> Tensor:
    gradient = torch.where(used[..., None], gradient, 0.0).to(logits.dtype)
    return torch.nn.functional.pad(gradient, (0, logits.shape[-1] - gradient.shape[-1])).contiguous()


# operator with two passes, or backward pass: its function
PASSES = {
    pass_.__name__: pass_
    for pass_ in (topk_policy_loss, topk_forward_kl, reverse_kl, logprobs_backward, reverse_kl_backward)
}

"""KL(student || teacher) as a loss."""

from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..formulas import Rows
from ._losses import differentiable, full_width, probabilities


def reverse_kl(a: Any) -> Tensor:
    return differentiable(lambda logits: _forward(a, logits)[0], a.student_logits, a.vocab_size)


def forward_pass(a: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss, and save a state for `reverse_kl_backward`."""
    loss, kl, student, teacher, used = _forward(a, a.student_logits)
    return loss, formulas.spoilt_state(state_of(student, teacher, kl, used), loss)


def _forward(a: Any, student_logits: Tensor) -> tuple[Tensor, Tensor, Rows, Rows, Tensor]:
    factor = formulas.loss_factor(a.weight, a.mask, student_logits[..., 0])
    used = factor != 0
    student = formulas.read_rows(student_logits, used, a.vocab_size, a.student_temperature)
    teacher = formulas.read_rows(a.teacher_logits.detach(), used, a.vocab_size, a.teacher_temperature)
    kl = formulas.kl_divergence(student, teacher)
    loss = formulas.weighted(factor, kl).to(formulas.float_type(student_logits, a.teacher_logits))
    return loss, kl, student, teacher, used


def state_of(student: Rows, teacher: Rows, kl: Tensor, used: Tensor) -> Tensor:
    """Return what the backward pass needs of both rows."""
    peak = student.logits.argmax(-1, keepdim=True)
    log_ratio = (student.logprobs - teacher.logprobs).gather(-1, peak)[..., 0]
    of_student, of_teacher = (formulas.row_state(rows, used) for rows in (student, teacher))
    return formulas.reverse_kl_state(of_student, of_teacher, log_ratio, kl, used)


def reverse_kl_backward(a: Any) -> tuple[Tensor]:
    size = a.vocab_size or a.student_logits.shape[-1]
    used = a.scale != 0
    reference, mass, teacher_reference, offset, of_peak = (x[..., None] for x in a.state.unbind(-1))
    p = probabilities(a.student_logits, a.state, used, size, a.student_temperature)
    x, y = (logits[..., :size].to(torch.float64) for logits in (a.student_logits, a.teacher_logits))
    excess = (x - reference) / a.student_temperature - (y - teacher_reference) / a.teacher_temperature - offset
    # The excess of an id with most of the mass is a sum of many small terms, which float32 cannot resolve.
    excess = torch.where((mass < 1.5) & (x == reference) & ~offset.isnan(), of_peak, excess)
    gradient = torch.where((p == 0) & ~offset.isnan(), 0.0, p * excess)
    scale = a.scale.to(torch.float64) / a.student_temperature
    return (full_width(a.student_logits, gradient * scale[..., None], used),)

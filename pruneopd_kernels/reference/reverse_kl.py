"""KL(student || teacher) as a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checking import check
from ._losses import StudentRows, differentiable, student_rows
from ._rows import float_type, valid_positions


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The definition of `pruneopd_kernels.reverse_kl`."""
    check(
        "reverse_kl",
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        weight=weight,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    used = used_positions(student_logits, mask, weight)
    size = vocab_size or student_logits.shape[-1]
    teacher = student_rows(teacher_logits.detach(), used, size, teacher_temperature)
    dtype = float_type(student_logits, teacher_logits)

    def loss_of(logits: Tensor) -> Tensor:
        student = student_rows(logits, used, size, student_temperature)
        return weighted(divergence(student, teacher), weight, used).to(dtype)

    return differentiable(loss_of, student_logits, vocab_size)


def used_positions(student_logits: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """Valid positions of a weight that is not 0."""
    valid = valid_positions(mask, student_logits, student_logits.shape[:-1])
    return valid if weight is None else valid & (weight.detach() != 0)


def weighted(loss: Tensor, weight: Tensor | None, used: Tensor) -> Tensor:
    return torch.where(used, loss if weight is None else weight.detach().to(torch.float64) * loss, 0.0)


def divergence(student: StudentRows, teacher: StudentRows) -> Tensor:
    """KL, for a gradient to pass through; +inf where an id has log q = -inf < log p, even if p is too small."""
    exists = student.logprobs != -torch.inf
    p, q = (torch.where(exists, x, 0.0) for x in (student.logprobs, teacher.logprobs))
    impossible = q == -torch.inf
    terms = student.logprobs.exp() * (p - q.masked_fill(impossible, 0.0))
    kl = terms.sum(-1)
    kl = kl + (kl.clamp(min=0.0) - kl).detach()
    return kl.masked_fill(impossible.any(-1), torch.inf).masked_fill(student.broken | teacher.broken, torch.nan)

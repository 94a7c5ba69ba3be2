"""KL(student || teacher) as a loss."""

from __future__ import annotations

from torch import Tensor

from ..formulas import float_type, kl_divergence, read_rows, weighted_loss, weighted_positions
from ._checking import check
from ._losses import differentiable


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
    used = weighted_positions(student_logits, mask, weight)
    teacher = read_rows(teacher_logits.detach(), used, vocab_size, teacher_temperature)
    dtype = float_type(student_logits, teacher_logits)

    def loss_of(logits: Tensor) -> Tensor:
        student = read_rows(logits, used, vocab_size, student_temperature)
        return weighted_loss(kl_divergence(student, teacher), weight, used).to(dtype)

    return differentiable(loss_of, student_logits, vocab_size)

"""KL(student || teacher) as a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..formulas import float_type, kl_divergence, read_rows, weighted_loss, weighted_positions
from ._losses import differentiable


def reverse_kl(a: Any) -> Tensor:
    """The definition of `pruneopd_kernels.reverse_kl`."""
    used = weighted_positions(a.student_logits, a.mask, a.weight)
    teacher = read_rows(a.teacher_logits.detach(), used, a.vocab_size, a.teacher_temperature)
    dtype = float_type(a.student_logits, a.teacher_logits)

    def loss_of(logits: Tensor) -> Tensor:
        student = read_rows(logits, used, a.vocab_size, a.student_temperature)
        return weighted_loss(kl_divergence(student, teacher), a.weight, used).to(dtype)

    return differentiable(loss_of, a.student_logits, a.vocab_size)

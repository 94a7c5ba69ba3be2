"""KL(student || teacher) as a loss, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch.registration import OPS
from ..formulas import float_type, reverse_kl_state, weighted, weighted_loss, weighted_positions
from ._agreement import Slices
from ._exchange import gather
from ._loss import row_state, with_gradient
from ._rows import kl_divergence, softmax_of
from ._slice import KL_UNIT, logits_of_ids, pair_of, sent_divergence


def reverse_kl(slices: Slices, a: Any) -> Tensor:
    dtype = float_type(a.student_logits, a.teacher_logits)
    with torch.no_grad():
        used = weighted_positions(a.student_logits, a.mask, a.weight)
        pair = pair_of(slices, a, used, 1)
        x, y = (a.student_logits, a.student_temperature), (a.teacher_logits, a.teacher_temperature)
        student_top, student_log_mass, teacher_on_student_top, teacher_top, teacher_log_mass, kls = gather(
            slices,
            used.shape,
            dtype,
            pair.student.topk_logits[..., 0],
            pair.student.log_mass,
            logits_of_ids(slices, a.teacher_logits, pair.student.topk_ids, used)[..., 0],
            pair.teacher.topk_logits[..., 0],
            pair.teacher.log_mass,
            sent_divergence(slices, pair.reverse_kl, x, y),
        )
        student = softmax_of(student_top, student_log_mass, a.student_temperature)
        teacher = softmax_of(teacher_top, teacher_log_mass, a.teacher_temperature)
        kl = kl_divergence(student, teacher, kls * KL_UNIT)
        loss = weighted_loss(kl, a.weight, used).to(dtype)
        # The peak is the first of the student's greatest logits.
        peak = teacher_on_student_top.gather(0, student_top.argmax(0, keepdim=True))[0]
        log_ratio = student.logprobs(student.top[..., None]) - teacher.logprobs(peak[..., None])
        state = reverse_kl_state(
            row_state(student, used), row_state(teacher, used)[0], student.log_mass, teacher.log_mass,
            log_ratio[..., 0], kl, loss, used,
        )  # fmt: skip
        scale = weighted_loss(torch.ones_like(kl), a.weight, used)
    options = slices.options("student_temperature", "teacher_temperature")

    def gradient_of(
        gradient: Tensor, student_logits: Tensor, teacher_logits: Tensor, state: Tensor, scale: Tensor
    ) -> Tensor:
        scale = weighted(scale, gradient)
        return OPS._reverse_kl_backward(student_logits, teacher_logits, state, scale, **options)  # type: ignore[no-any-return]

    return with_gradient(slices, a.student_logits, loss, gradient_of, [a.teacher_logits.detach()], [state, scale])

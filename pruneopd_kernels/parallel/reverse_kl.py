"""`parallel.reverse_kl`: KL(student || teacher) as a loss, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formulas import float_type, weighted_loss, weighted_positions
from ..ops._operator import Impl
from ..ops._registration import OPS
from ._agreement import agree
from ._exchange import gather, outside_graphs
from ._loss import row_state, with_gradient
from ._rows import Softmax, kl_divergence, softmax_of
from ._slice import KL_UNIT, logits_of_ids, pair_of, sent_divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@outside_graphs
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """`pruneopd_kernels.reverse_kl` over a vocabulary that is split over the ranks of a group.

    Every rank calls it, with its slice of the logits and with all else equal, and gets the same loss. Two exchanges:
    32 bytes a rank to agree, then 24 bytes for each position and rank. None in the backward pass.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V_r]`: this rank's slice, of any width, 0 too. Slices are
            contiguous and in the order of the ranks. Stride 1 on the last axis, any other strides.
        teacher_logits: the same ids of the teacher; the dtype may differ, and so may the width beyond vocab_size.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        weight: float `[...]`: what each position's divergence is multiplied by. None: 1.
        student_temperature: What the student's logits are divided by, > 0.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist, of the whole vocabulary. None: the widths of all slices together.
        impl: Implementation to use for the slice; an explicit one runs or raises.
        group: Group of `torch.distributed` whose ranks hold the slices. None: all ranks.

    Returns:
        float32 `[...]`: the loss of each position, the same on every rank, differentiable in this rank's
        `student_logits` alone, once. Each rank backpropagates the same loss and gets its slice of the gradient of that
        one loss: nothing is summed over ranks.

    Raises:
        ValueError: On every rank: a shape or a value is not allowed on some rank, or differs between ranks.
        TypeError: The same of a dtype.
        RuntimeError: The implementation is not usable on some rank.
    """
    slices = agree(
        "reverse_kl",
        group,
        {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "mask": mask,
            "weight": weight,
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
            "vocab_size": vocab_size,
            "impl": impl,
        },
    )
    dtype = float_type(student_logits, teacher_logits)
    with torch.no_grad():
        used = weighted_positions(student_logits, mask, weight)
        temperatures = (student_temperature, teacher_temperature)
        pair = pair_of(slices, student_logits, teacher_logits, used, 1, *temperatures, impl)
        record = _Record(
            pair.student.topk_logits[..., 0],
            pair.student.log_mass,
            logits_of_ids(slices, teacher_logits, pair.student.topk_ids, used)[..., 0],
            pair.teacher.topk_logits[..., 0],
            pair.teacher.log_mass,
            sent_divergence(slices, pair.reverse_kl, student_logits, teacher_logits, *temperatures),
        )
        everyone = gather(record, slices, used.shape, dtype)
        student = softmax_of(everyone.student_top, everyone.student_log_mass, student_temperature)
        teacher = softmax_of(everyone.teacher_top, everyone.teacher_log_mass, teacher_temperature)
        kl = kl_divergence(student, teacher, everyone.reverse_kl * KL_UNIT)
        loss = weighted_loss(kl, weight, used).to(dtype)
        state = torch.stack(_state(student, teacher, everyone, kl, loss, used), -1)
        scale = weighted_loss(torch.ones_like(kl), weight, used)

    def gradient_of(
        gradient: Tensor, student_logits: Tensor, teacher_logits: Tensor, state: Tensor, scale: Tensor
    ) -> Tensor:
        return OPS._reverse_kl_backward(  # type: ignore[no-any-return]
            student_logits, teacher_logits, state, torch.where(scale == 0, 0.0, gradient * scale),
            student_temperature=student_temperature, teacher_temperature=teacher_temperature,
            vocab_size=slices.width, impl=impl,
        )  # fmt: skip

    inputs, computed = [teacher_logits.detach()], [state, scale]
    return with_gradient("reverse_kl", slices, student_logits, loss, gradient_of, inputs, computed, impl)


class _Record(NamedTuple):
    """What a rank tells of its slice, per position."""

    student_top: Tensor
    student_log_mass: Tensor
    teacher_on_student_top: Tensor  # the teacher's logit where the student's is greatest
    teacher_top: Tensor
    teacher_log_mass: Tensor
    reverse_kl: Tensor


def _state(
    student: Softmax, teacher: Softmax, everyone: _Record, kl: Tensor, loss: Tensor, used: Tensor
) -> list[Tensor]:
    """What a backward pass needs: both references, the student's mass, what else an id's excess is made of.

    As `reference._saving.reverse_kl` has it; the peak is the first of the student's greatest logits.
    """
    reference, mass = row_state(student, used)
    teacher_reference, _ = row_state(teacher, used)
    offset = torch.where(used, kl + student.log_mass - teacher.log_mass, 0.0).masked_fill(~loss.isfinite(), torch.nan)
    peak = everyone.teacher_on_student_top.gather(0, everyone.student_top.argmax(0, keepdim=True))[0]
    log_ratio = student.logprobs(student.top[..., None]) - teacher.logprobs(peak[..., None])
    return [reference, mass, teacher_reference, offset, torch.where(used, log_ratio[..., 0] - kl, 0.0)]

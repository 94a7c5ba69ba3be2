"""`reverse_kl`: KL(student || teacher) over the whole vocabulary as a loss, fused with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._rows import float_type
from ._implementations import Impl
from ._losses import saved_type
from ._registration import OPS, Outputs, call, register_backward, register_loss


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
) -> Tensor:
    """KL(student || teacher) at each position, times a weight such as L (Prune-OPD, arXiv:2605.07804, eq. 10).

        loss = weight * sum(p * (log p - log q))

    with p and q the softmax of each side's logits over its temperature; the sum runs over the whole vocabulary. The
    forward pass reads each logit once and saves five floats a position; the backward pass reads each logit once and
    writes the student's gradient once. Nothing else of the vocabulary's size is written.

    A logit of -inf is an ordinary one: where log q = -inf < log p, KL is +inf. A row with a NaN, a +inf or no finite
    logit makes it NaN. Where a loss, or KL itself in float32, is not finite, the gradient is NaN for every id. Where a
    position is masked or its weight is 0, the logits are not read, loss and gradient are 0.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides:
            `logits[:, :-1]` is taken without a copy.
        teacher_logits: the same but for V and the dtype, which may differ.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        weight: float `[...]`: what each position's divergence is multiplied by. None: 1.
        student_temperature: What the student's logits are divided by, > 0.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist; required where the last axes differ. Ids from it on get a gradient of 0.
            None: V.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        float32 `[...]`: the loss of each position, differentiable in `student_logits` alone, once. The gradient has
        the logits' dtype.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import reverse_kl
        >>> student = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
        >>> loss = reverse_kl(student, torch.tensor([[1.0, 2.0, 0.0]]))
        >>> loss.detach()
        tensor([0.1547])
        >>> loss.sum().backward()
        >>> student.grad
        tensor([[-0.1040, -0.1029,  0.2069]])
    """
    return call(  # type: ignore[no-any-return]
        "reverse_kl",
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        weight=weight,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        impl=impl,
    )


def _fake(*, student_logits: Tensor, teacher_logits: Tensor, impl: str, **_: Any) -> Outputs:
    per_position, dtype = student_logits.shape[:-1], float_type(student_logits, teacher_logits)
    return (
        student_logits.new_empty(per_position, dtype=dtype),
        student_logits.new_empty((*per_position, 5), dtype=saved_type(impl)),
    )


def _backward(
    gradient: Tensor, saved: Outputs, *, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None,
    weight: Tensor | None, **scalars: Any,
) -> Tensor:  # fmt: skip
    (state,) = saved
    scale = gradient
    if weight is not None:
        scale = torch.where((weight == 0) | (gradient == 0), 0.0, gradient * weight.to(gradient.dtype))
    if mask is not None:
        scale = torch.where(mask != 0, scale, 0.0)
    return OPS._reverse_kl_backward(student_logits, teacher_logits, state, scale, **scalars)  # type: ignore[no-any-return]


register_loss("reverse_kl", _fake, ("student_logits", "teacher_logits", "mask", "weight"), _backward)
register_backward("reverse_kl_backward")

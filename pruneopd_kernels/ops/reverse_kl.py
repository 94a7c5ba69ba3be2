"""`reverse_kl`: KL(student || teacher) over the whole vocabulary as a loss, fused with its gradient."""

from __future__ import annotations

from typing import Any

from .. import checks
from ._operator import Impl, Tensor, backward_pass, operator, run_backward


@operator
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
    forward pass reads each logit once and saves five floats per position; the backward pass reads each logit once and
    writes the student's gradient once. Nothing else of the vocabulary's size is written.

    A logit of -inf is an ordinary one: where log q = -inf < log p, KL is +inf. A row with a NaN, a +inf or no finite
    logit makes it NaN. Where a loss is not finite, the gradient is NaN for every id. Where a position is masked or its
    weight is 0, the logits are not read, loss and gradient are 0. Arguments that `reliability` has, too, mean the
    same.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides:
            `logits[:, :-1]` is taken without a copy.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        weight: float `[...]`: what each position's divergence is multiplied by. None: 1.
        student_temperature: What the student's logits are divided by, > 0.
        vocab_size: Only ids below it exist; required where the last axes differ. Ids from it on get a gradient of 0.
            None: V.

    Returns:
        float32 `[...]`: the losses, differentiable in `student_logits` alone, once. The gradient has its dtype.

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
    ...


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    # A weight may be anything, so there are no values to look at.
    logits = a.student_logits
    checks.logits(op, "student_logits", logits, float64)
    checks.logits(op, "teacher_logits", a.teacher_logits, float64, like=logits)
    checks.mask_of_positions(op, a.mask, logits, logits.shape[:-1])
    checks.has_one_for_each(op, "weight", a.weight, logits, logits.shape[:-1])
    checks.scalars(op, a)
    checks.vocab_size(op, a)


# Five floats a position: the student's reference and mass, the teacher's reference, what is left of KL if both logits
# are at their references, and the excess of the student's peak.
SAVED = ("state",)


def kept(a: Any) -> tuple[str, ...]:
    return "student_logits", "teacher_logits", "mask", "weight", "state"


def fake(a: Any, empty: Any) -> Any:
    return empty("logits"), empty("float64", 5)


def backward(a: Any, gradient: Tensor) -> Tensor:
    from .. import formulas

    return through_divergence(formulas.flowing(formulas.loss_factor(a.weight, a.mask, gradient), gradient), a)


def through_divergence(scale: Tensor, a: Any) -> Tensor:
    """Return the student's gradient of `scale * KL(student || teacher)`."""
    scalars = {name: getattr(a, name) for name in ("student_temperature", "teacher_temperature", "vocab_size")}
    tensors = a.student_logits, a.teacher_logits, a.state, scale
    return run_backward("reverse_kl_backward", a.impl, *tensors, **scalars)


@backward_pass
def reverse_kl_backward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    state: Tensor,
    scale: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute the gradient of `scale * KL(student || teacher)`."""
    ...

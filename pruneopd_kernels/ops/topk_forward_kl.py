"""`topk_forward_kl`: what a trainer computes when a teacher's server sends its top-k, fused with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._rows import float_type
from ..results import TopkForwardKl
from ._implementations import Impl
from ._losses import saved_type, through_logprobs
from ._registration import Outputs, call, register_loss


def topk_forward_kl(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    logprob_min: float | None = None,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> TopkForwardKl:
    """KL(teacher || student) over the teacher's candidates, and how both models' candidates agree.

    With T the teacher's candidates, log q their log-probabilities as given, S the k most probable ids of the student
    and p its softmax

        loss = sum(q[j] * (log q[j] - log p[j]) for j in T)
        O = |S & T| / k                                          (6)

    Nothing is renormalised: q sums to the mass that the teacher's candidates have. Where `logprob_min` is given, log q
    and log p are first raised to it; a log p below it has no gradient. The forward pass reads each logit once and
    saves k + 2 floats a position; the backward pass reads each logit once and writes its gradient once. A log-softmax
    is never written.

    An id below 0 is padding: it matches nothing and its log-probability is ignored. A log-probability of -inf has no
    mass, unless it is raised; where another one is NaN, so are the loss and the teacher's mass. Where
    log p = -inf < log q the loss is +inf. A row with a NaN, a +inf or no finite logit has overlap 0, and its loss,
    student's mass and advantage are NaN. Where a loss is not finite, the gradient is NaN for every id. At a masked
    position the logits are never read: floats are 0, candidates are 0 .. k-1, the gradient is 0.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides.
        teacher_topk_ids: int32 or int64 `[..., k]`, k from 1 to min(vocab_size, 256), in any order.
        teacher_topk_logprobs: float `[..., k]`, natural logarithms.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        logprob_min: What log-probabilities are raised to, finite. None: they stay as they are.
        student_temperature: What the student's logits are divided by, > 0. The teacher's log-probabilities come with
            whatever temperature they were made with.
        vocab_size: Only ids below it exist, for the candidates and for the softmax. None: V.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        The fields of `TopkForwardKl`. `loss` is differentiable in `student_logits` alone, once; the gradient has the
        logits' dtype. `student_topk_ids` are in descending order of logit, of equal ones the lower id first.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import topk_forward_kl
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
        >>> out = topk_forward_kl(logits, torch.tensor([[1, 0]]), torch.tensor([[0.6, 0.3]]).log())
        >>> out.loss.detach(), out.overlap, out.student_topk_ids
        (tensor([0.2992]), tensor([0.5000]), tensor([[1, 2]]))
        >>> out.loss.sum().backward()
        >>> logits.grad
        tensor([[-0.2190, -0.0013,  0.2203]])
    """
    outputs = call(
        "topk_forward_kl",
        student_logits=student_logits,
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_logprobs=teacher_topk_logprobs,
        mask=mask,
        logprob_min=logprob_min,
        student_temperature=student_temperature,
        vocab_size=vocab_size,
        impl=impl,
    )
    return TopkForwardKl(*outputs)


def _fake(*, student_logits: Tensor, teacher_topk_ids: Tensor, impl: str, **_: Any) -> Outputs:
    per_position, dtype = student_logits.shape[:-1], float_type(student_logits)
    k, saved = teacher_topk_ids.shape[-1], saved_type(impl)

    def new(*more: int | torch.SymInt, dtype: torch.dtype = dtype) -> Tensor:
        return student_logits.new_empty((*per_position, *more), dtype=dtype)

    measures = (new(), new(), new(), new(dtype=torch.float32), new())
    return *measures, new(k, dtype=torch.int64), new(k, dtype=saved), new(2, dtype=saved)


def _backward(gradient: Tensor, saved: Outputs, *, teacher_topk_ids: Tensor, **arguments: Any) -> Tensor:
    return through_logprobs(gradient, saved, topk_ids=teacher_topk_ids, **arguments)


register_loss("topk_forward_kl", _fake, ("student_logits", "teacher_topk_ids"), _backward)

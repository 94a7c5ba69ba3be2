"""What the losses share: the student's rows at candidates, and the gradient of one rank's slice.

Every rank has the same loss, and what is saved of it is about the whole row. So each rank finds the gradient of its
slice by itself, with the backward passes that whole rows have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas import coefficients_of, float_type
from ..ops import _implementations as implementations
from ..ops._operator import Impl
from ..ops._registration import OPS
from ._agreement import Slices
from ._exchange import gather
from ._rows import Softmax, candidates_where, first_candidates, from_owners, local_ids, softmax_of
from ._slice import logits_of_ids, student_of


class StudentRows(NamedTuple):
    """The student's whole rows."""

    softmax: Softmax
    topk_ids: Tensor  # [..., k]
    logprobs: Tensor  # of the ids that were asked for, NaN where broken or where there is no such id


class _Record(NamedTuple):
    """What a rank tells of its slice, per position."""

    topk_ids: Tensor
    topk_logits: Tensor
    log_mass: Tensor
    logits_of_ids: Tensor


def student_rows(
    slices: Slices, student_logits: Tensor, ids: Tensor, used: Tensor, k: int, temperature: float, impl: Impl
) -> StudentRows:
    """The first k ids of each row and the log-probabilities of `ids`, from one exchange."""
    side = student_of(slices, student_logits, used, k, temperature, impl)
    record = _Record(*side, logits_of_ids(slices, student_logits, ids, used))
    everyone = gather(record, slices, used.shape, float_type(student_logits))
    softmax = softmax_of(everyone.topk_logits[..., 0], everyone.log_mass, temperature)
    _, topk_ids = first_candidates(slices, k, everyone.topk_logits, everyone.topk_ids)
    logprobs = softmax.logprobs(from_owners(slices, ids, everyone.logits_of_ids))
    logprobs = logprobs.masked_fill(ids >= slices.vocab_size, torch.nan)
    return StudentRows(softmax, candidates_where(used, topk_ids), logprobs)


def row_state(softmax: Softmax, used: Tensor) -> list[Tensor]:
    """What tells a row's softmax to a backward pass: a logit to refer to, and the mass relative to it."""
    state = (softmax.top, softmax.log_mass.exp())
    return [torch.where(used, x.masked_fill(softmax.broken, torch.nan), 0.0) for x in state]


def through_logprobs(
    op: str,
    slices: Slices,
    student_logits: Tensor,
    loss: Tensor,
    ids: Tensor,
    derivatives: Tensor,
    softmax: Softmax,
    used: Tensor,
    impl: Impl,
) -> Tensor:
    """The loss, with its gradient by this rank's logits from its derivatives by the log-probabilities of ids."""
    with torch.no_grad():
        coefficients = coefficients_of(loss, derivatives, used)
        state = torch.stack(row_state(softmax, used), -1)

    def gradient_of(gradient: Tensor, student_logits: Tensor, *saved: Tensor) -> Tensor:
        return OPS._logprobs_backward(  # type: ignore[no-any-return]
            student_logits, *saved, gradient,
            student_temperature=softmax.temperature, vocab_size=slices.width, impl=impl,
        )  # fmt: skip

    # Candidates of other ranks count in the sum of the coefficients, and have no logit here.
    return with_gradient(
        op, slices, student_logits, loss, gradient_of, [local_ids(slices, ids)], [coefficients, state], impl
    )


def with_gradient(
    op: str,
    slices: Slices,
    student_logits: Tensor,
    loss: Tensor,
    gradient_of: Callable[..., Tensor],
    inputs: list[Tensor],
    computed: list[Tensor],
    impl: Impl,
) -> Tensor:
    """The loss, with `gradient_of(gradient, student_logits, *inputs, *computed)`, the latter in what `impl` saves."""
    dtype = implementations.saved_type(implementations.choose(op, impl, student_logits.device))

    def of_slice(gradient: Tensor, student_logits: Tensor, *saved: Tensor) -> Tensor:
        if slices.width == 0:
            return torch.zeros_like(student_logits)
        return gradient_of(gradient, student_logits, *saved)

    saved = [*inputs, *(x.to(dtype) for x in computed)]
    return _WithGradient.apply(student_logits, loss, of_slice, *saved)  # type: ignore[no-any-return,no-untyped-call]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, loss: Tensor, gradient_of: Callable[..., Tensor], *saved: Tensor
    ) -> Tensor:
        tensors = (student_logits, *saved)
        # What comes from inference mode cannot be saved, and needs not be watched for changes: nobody may make any.
        ctx.unsaved = [x if x.is_inference() else None for x in tensors]
        ctx.save_for_backward(*(None if x.is_inference() else x for x in tensors))
        ctx.gradient_of = gradient_of
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.unsaved, strict=True)
        tensors = [unsaved if saved is None else saved for saved, unsaved in pairs]
        return ctx.gradient_of(gradients[0], *tensors), *[None] * (len(tensors) + 1)

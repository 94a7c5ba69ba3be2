"""What the losses share: the student's rows at candidates, and the gradient of one rank's slice.

Every rank has the same loss, and saves the same of the whole row. So each rank computes the gradient of its slice by
itself, with the backward passes for whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import implementations
from ..dispatch.registration import OPS
from ..formulas import coefficients_of, float_type
from ._agreement import Slices
from ._exchange import gather
from ._rows import Softmax, candidates_where, from_owners, local_ids, whole_rows
from ._slice import logits_of_ids, student_of


class StudentRows(NamedTuple):
    """The student's whole rows."""

    softmax: Softmax
    topk_ids: Tensor  # [..., k]
    logprobs: Tensor  # of the ids that were asked for, NaN where broken or where there is no such id


def student_rows(slices: Slices, a: Any, ids: Tensor, used: Tensor, k: int) -> StudentRows:
    """Return the first k ids of each row and the log-probabilities of `ids`, from one exchange."""
    mine = (*student_of(slices, a, used, k), logits_of_ids(slices, a.student_logits, ids, used))
    *side, logits = gather(slices, used.shape, float_type(a.student_logits), *mine)
    softmax, (_, topk_ids) = whole_rows(slices, k, a.student_temperature, *side)
    logprobs = softmax.logprobs(from_owners(slices, ids, logits)).masked_fill(ids >= slices.vocab_size, torch.nan)
    return StudentRows(softmax, candidates_where(used, topk_ids), logprobs)


def row_state(softmax: Softmax, used: Tensor) -> list[Tensor]:
    """Return what defines a row's softmax in a backward pass: a reference logit, and the mass relative to it."""
    state = (softmax.top, softmax.log_mass.exp())
    return [torch.where(used, x.masked_fill(softmax.broken, torch.nan), 0.0) for x in state]


def through_logprobs(
    slices: Slices,
    student_logits: Tensor,
    loss: Tensor,
    ids: Tensor,
    derivatives: Tensor,
    softmax: Softmax,
    used: Tensor,
) -> Tensor:
    """Return the loss, with its gradient by this rank's logits from its derivatives by the log-probabilities of ids."""
    with torch.no_grad():
        coefficients = coefficients_of(loss, derivatives, used)
        state = torch.stack(row_state(softmax, used), -1)
    options = slices.options("student_temperature")

    def gradient_of(gradient: Tensor, student_logits: Tensor, *saved: Tensor) -> Tensor:
        return OPS._logprobs_backward(student_logits, *saved, gradient, **options)  # type: ignore[no-any-return]

    # Candidates of other ranks count in the sum of the coefficients, and have no logit here.
    return with_gradient(slices, student_logits, loss, gradient_of, [local_ids(slices, ids)], [coefficients, state])


def with_gradient(
    slices: Slices,
    student_logits: Tensor,
    loss: Tensor,
    gradient_of: Callable[..., Tensor],
    inputs: list[Tensor],
    computed: list[Tensor],
) -> Tensor:
    """Return the loss, with `gradient_of(gradient, student_logits, *inputs, *computed)`; the latter as saved."""
    chosen = implementations.choose("parallel", slices.given["impl"], student_logits.device)
    saved = [*inputs, *(x.to(implementations.saved_type(chosen)) for x in computed)]

    def of_slice(gradient: Tensor, student_logits: Tensor, *saved: Tensor) -> Tensor:
        if slices.width == 0:
            return torch.zeros_like(student_logits)
        return gradient_of(gradient, student_logits, *saved)

    return _WithGradient.apply(student_logits, loss, of_slice, *saved)  # type: ignore[no-any-return,no-untyped-call]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, loss: Tensor, gradient_of: Callable[..., Tensor], *saved: Tensor
    ) -> Tensor:
        tensors = (student_logits, *saved)
        # Inference tensors cannot be saved for backward; they are immutable, so a plain reference is enough.
        ctx.unsaved = [x if x.is_inference() else None for x in tensors]
        ctx.save_for_backward(*(None if x.is_inference() else x for x in tensors))
        ctx.gradient_of = gradient_of
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.unsaved, strict=True)
        tensors = [unsaved if saved is None else saved for saved, unsaved in pairs]
        return ctx.gradient_of(gradients[0], *tensors), *[None] * (len(tensors) + 1)

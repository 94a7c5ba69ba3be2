"""What the losses share: which rows count, log-probabilities of candidates, gradients where a loss is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StudentRows(NamedTuple):
    """Rows of the student's logits over the ids that exist, in float64, for a gradient to pass through."""

    logits: Tensor
    logprobs: Tensor  # NaN where broken
    broken: Tensor


def student_rows(logits: Tensor, used: Tensor, vocab_size: int, temperature: float) -> StudentRows:
    """Where a row is not used, it is read as zeros and gets a gradient of 0, whatever is in it."""
    x = torch.where(used[..., None], logits[..., :vocab_size].to(torch.float64), 0.0)
    broken = (x.isnan() | (x == torch.inf)).any(-1) | ~x.isfinite().any(-1)
    return StudentRows(x, torch.log_softmax(x / temperature, -1).masked_fill(broken[..., None], torch.nan), broken)


def differentiable(loss_of: Callable[[Tensor], Tensor], student_logits: Tensor, vocab_size: int | None) -> Tensor:
    """`loss_of(student_logits)`, with a gradient of NaN for every id that exists where the loss is not finite.

    What autograd makes of such a row depends on how its formula is written down.
    """
    x = student_logits[..., :vocab_size]
    with torch.no_grad():
        loss = loss_of(x.detach())
    spoilt = ~loss.isfinite()
    finite = loss_of(torch.where(spoilt[..., None], 0.0, x))  # whose gradient stops at what is replaced
    return torch.where(spoilt, loss, finite) + _NanGradient.apply(x, loss, spoilt)  # type: ignore[no-any-return, no-untyped-call]


class _NanGradient(torch.autograd.Function):
    """0 like `loss`, with a gradient of NaN by the rows of x that are spoilt; but of 0 where nobody asks for one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, spoilt: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, _, spoilt = inputs
        ctx.save_for_backward(spoilt)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (spoilt,) = ctx.saved_tensors
        rows = torch.where(spoilt & (gradient != 0), torch.nan, 0.0)
        return rows[..., None].to(ctx.dtype).expand(ctx.shape), None, None


def candidate_logprobs(logprobs: Tensor, ids: Tensor) -> Tensor:
    """log p of candidates, NaN for an id that does not exist; of padding, that of id 0."""
    ids = ids.to(torch.int64)
    exists = ids < logprobs.shape[-1]
    return logprobs.gather(-1, torch.where(exists, ids, 0).clamp(min=0)).masked_fill(~exists, torch.nan)


def row_state(rows: StudentRows, used: Tensor, temperature: float) -> list[Tensor]:
    """What tells a row's softmax: a logit to refer to, and the sum of exp((logit - reference) / temperature)."""
    reference = rows.logits.amax(-1)
    mass = ((rows.logits - reference[..., None]) / temperature).exp().sum(-1)
    return [torch.where(used, x.masked_fill(rows.broken, torch.nan), 0.0) for x in (reference, mass)]

"""What the losses share: which rows count, log-probabilities of candidates, gradients where a loss is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._rows import float_type


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


def differentiable(loss_of: Callable[[Tensor], Tensor], student_logits: Tensor) -> Tensor:
    """`loss_of(student_logits)`, with a gradient of NaN for every id of a row whose loss is not finite.

    What autograd makes of such a row depends on how its formula is written down.
    """
    dtype = float_type(student_logits)
    with torch.no_grad():
        loss = loss_of(student_logits.detach()).to(dtype)
    spoilt = ~loss.isfinite()
    factor = torch.where(spoilt, torch.nan, 1.0).to(student_logits.dtype)
    # A gradient of 0 that goes back through NaN becomes NaN.
    return torch.where(spoilt, loss, loss_of(student_logits * factor[..., None]).to(dtype))


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

"""The clipped policy-gradient loss over candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import (
    Rows,
    candidate_logprobs,
    coefficients_of,
    float_type,
    policy_positions,
    policy_terms,
    read_rows,
    row_state,
)
from ._losses import differentiable


def topk_policy_loss(a: Any) -> Tensor:
    """Compute the loss, differentiable by autograd."""
    return differentiable(lambda logits: _forward(a, logits)[0], a.student_logits, a.vocab_size)


def forward_pass(a: Any) -> tuple[Tensor, ...]:
    """Compute the loss, and save for `logprobs_backward` the coefficients and the state of the row."""
    loss, derivatives, rows, used = _forward(a, a.student_logits)
    return loss, coefficients_of(loss, derivatives, used), torch.stack(row_state(rows, used), -1)


def _forward(a: Any, student_logits: Tensor) -> tuple[Tensor, Tensor, Rows, Tensor]:
    used = policy_positions(a.topk_ids, a.advantages, a.mask)
    rows = read_rows(student_logits, used, a.vocab_size, a.student_temperature)
    logprobs = candidate_logprobs(rows.logprobs, a.topk_ids)
    terms, derivatives = policy_terms(
        logprobs, a.topk_ids, a.advantages, a.old_logprobs, a.clip_low, a.clip_high, a.clip_dual
    )
    loss = torch.where(used, terms.sum(-1), 0.0).to(float_type(student_logits))
    return loss, derivatives, rows, used

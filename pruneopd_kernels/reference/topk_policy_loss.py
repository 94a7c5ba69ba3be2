"""The clipped policy-gradient loss over candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import candidate_logprobs, float_type, policy_positions, policy_terms, read_rows
from ._losses import differentiable


def topk_policy_loss(a: Any) -> Tensor:
    """The definition of `pruneopd_kernels.topk_policy_loss`."""
    used = policy_positions(a.topk_ids, a.advantages, a.mask)

    def loss_of(logits: Tensor) -> Tensor:
        rows = read_rows(logits, used, a.vocab_size, a.student_temperature)
        logprobs = candidate_logprobs(rows.logprobs, a.topk_ids)
        terms, _ = policy_terms(
            logprobs, a.topk_ids, a.advantages, a.old_logprobs, a.clip_low, a.clip_high, a.clip_dual
        )
        return torch.where(used, terms.sum(-1), 0.0).to(float_type(logits))

    return differentiable(loss_of, a.student_logits, a.vocab_size)

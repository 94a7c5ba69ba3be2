"""The clipped policy-gradient loss over candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import candidate_logprobs, float_type, policy_positions, policy_terms, read_rows
from ._checking import check
from ._losses import differentiable


def topk_policy_loss(
    student_logits: Tensor,
    topk_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float = 3.0,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The definition of `pruneopd_kernels.topk_policy_loss`."""
    check(
        "topk_policy_loss",
        student_logits=student_logits,
        topk_ids=topk_ids,
        advantages=advantages,
        mask=mask,
        old_logprobs=old_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_dual=clip_dual,
        student_temperature=student_temperature,
        vocab_size=vocab_size,
    )
    used = policy_positions(topk_ids, advantages, mask)

    def loss_of(logits: Tensor) -> Tensor:
        rows = read_rows(logits, used, vocab_size, student_temperature)
        logprobs = candidate_logprobs(rows.logprobs, topk_ids)
        terms, _ = policy_terms(logprobs, topk_ids, advantages, old_logprobs, clip_low, clip_high, clip_dual)
        return torch.where(used, terms.sum(-1), 0.0).to(float_type(logits))

    return differentiable(loss_of, student_logits, vocab_size)

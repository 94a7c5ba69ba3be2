"""The clipped policy-gradient loss over candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checking import check
from ._losses import candidate_logprobs, differentiable, student_rows
from ._rows import float_type, valid_positions

LARGEST_LOG_RATIO = 20.0


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
    used = used_positions(topk_ids, advantages, mask)

    def loss_of(logits: Tensor) -> Tensor:
        rows = student_rows(logits, used, logits.shape[-1], student_temperature)
        logprobs = candidate_logprobs(rows.logprobs, topk_ids)
        terms, _ = policy_terms(logprobs, topk_ids, advantages, old_logprobs, clip_low, clip_high, clip_dual)
        return torch.where(used, terms.sum(-1), 0.0).to(float_type(logits))

    return differentiable(loss_of, student_logits, vocab_size)


def used_positions(topk_ids: Tensor, advantages: Tensor, mask: Tensor | None) -> Tensor:
    """Valid positions with something to learn from."""
    valid = valid_positions(mask, topk_ids, topk_ids.shape[:-1])
    return valid & ((topk_ids >= 0) & (advantages != 0)).any(-1)


def policy_terms(
    logprobs: Tensor,
    topk_ids: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    clip_dual: float,
) -> tuple[Tensor, Tensor]:
    """Each candidate's term of the loss, and its derivative by the candidate's log-probability."""
    skipped = (topk_ids < 0) | (advantages == 0) | (logprobs == -torch.inf)
    logprobs = torch.where(skipped, 0.0, logprobs)
    advantages = torch.where(skipped, 0.0, advantages.detach().to(torch.float64))
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach().to(torch.float64)
    log_ratio = torch.where(skipped, 0.0, logprobs - old)
    ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    # Not greater: NaN stays, and of what is equal the unclipped one counts.
    by_ratio = ~(unclipped < clipped)
    terms = torch.where(by_ratio, unclipped, clipped)
    bound = torch.where(advantages < 0, -advantages * clip_dual, torch.inf)
    by_dual = terms > bound
    terms = torch.where(skipped, 0.0, torch.where(by_dual, bound, terms))
    moves = by_ratio & ~by_dual & ~(log_ratio.abs() > LARGEST_LOG_RATIO) & ~skipped
    return terms, torch.where(moves, unclipped, 0.0)

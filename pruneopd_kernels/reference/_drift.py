"""What makes a position drift: too small an overlap (eq. 6, 7), or a token outside of the teacher's nucleus (14-16)."""

from __future__ import annotations

import torch
from torch import Tensor

# Sums of rounded probabilities that ought to reach top_p may fall short of it by this.
MASS_TOLERANCE = 1e-6


def overlap_count(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    """How many of the student's candidates are among the teacher's; an id below 0 is among nothing."""
    same = student_topk_ids[..., :, None] == teacher_topk_ids[..., None, :]
    return (same.any(-1) & (student_topk_ids >= 0)).sum(-1)


def overlap_of(count: Tensor, k: int) -> Tensor:
    """O (eq. 6) in float64, of the exact count."""
    return count.to(torch.float64) / k


def accepted(token_ids: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor, top_p: float) -> Tensor:
    """Whether the token is in the nucleus: the shortest prefix whose mass reaches top_p, or all if none does."""
    candidate = teacher_topk_ids >= 0
    logprobs = teacher_topk_logprobs.to(torch.float64).masked_fill(~candidate, -torch.inf)
    mass = logprobs.exp().cumsum(-1)
    reached = (mass >= top_p - MASS_TOLERANCE) & candidate
    before = reached.cumsum(-1) - reached.to(torch.int64)  # prefixes that were enough before this candidate
    in_nucleus = candidate & (before == 0)
    return (in_nucleus & (teacher_topk_ids == token_ids[..., None])).any(-1) & ~logprobs.isnan().any(-1)

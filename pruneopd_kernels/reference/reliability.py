"""Reliability and rewards from both sides' logits (eq. 6-12, 14-16)."""

from __future__ import annotations

from typing import Any

import torch

from ..formulas import (
    accepted,
    candidate_rewards,
    float_type,
    overlap_count,
    overlap_of,
    read_rows,
    scan,
    topk_ids,
    valid_positions,
    weighted,
)
from ..ops import Reliability


@torch.no_grad()
def reliability(a: Any) -> Reliability:
    """The definition of `pruneopd_kernels.reliability`."""
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    student = read_rows(a.student_logits, valid, a.vocab_size, a.student_temperature)
    teacher = read_rows(a.teacher_logits, valid, a.vocab_size, a.teacher_temperature)
    student_topk_ids, teacher_topk_ids = (topk_ids(rows.logits, a.k) for rows in (student, teacher))
    broken = student.broken | teacher.broken

    overlap = overlap_of(overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(broken, 0), a.k)
    if a.metric == "overlap":
        drift = overlap < a.threshold
    else:
        assert a.token_ids is not None
        teacher_topk_logprobs = teacher.logprobs.gather(-1, teacher_topk_ids)
        drift = ~accepted(a.token_ids, teacher_topk_ids, teacher_topk_logprobs, a.top_p) | broken
    drift = drift & valid
    along = scan(drift, valid, a.cu_seqlens, a.drift_count, a.w_drop, a.w_base, a.eps)

    rewards = candidate_rewards(
        student.logprobs.gather(-1, student_topk_ids),
        teacher.logprobs.gather(-1, student_topk_ids),
        torch.ones_like(student_topk_ids, dtype=torch.bool),
        a.reward_weight,
    )
    return Reliability(
        torch.where(valid, overlap, 0.0).to(torch.float32),
        drift,
        *along,
        student_topk_ids,
        weighted(along.weight[..., None].to(torch.float64), rewards).to(float_type(a.student_logits, a.teacher_logits)),
    )

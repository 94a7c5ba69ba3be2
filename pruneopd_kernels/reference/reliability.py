"""Reliability and rewards from both sides' logits (eq. 6-12, 14-16)."""

from __future__ import annotations

from typing import Any

import torch

from ..formulas import (
    candidate_rewards,
    float_type,
    overlap_and_drift,
    read_rows,
    scan,
    topk_ids,
    valid_positions,
    weighted,
)
from ..ops import Reliability


@torch.no_grad()
def reliability(a: Any) -> Reliability:
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    student = read_rows(a.student_logits, valid, a.vocab_size, a.student_temperature)
    teacher = read_rows(a.teacher_logits, valid, a.vocab_size, a.teacher_temperature)
    student_topk_ids, teacher_topk_ids = (topk_ids(rows.logits, a.k) for rows in (student, teacher))
    teacher_topk_logprobs = teacher.logprobs.gather(-1, teacher_topk_ids)
    broken = student.broken | teacher.broken
    overlap, drift = overlap_and_drift(student_topk_ids, teacher_topk_ids, teacher_topk_logprobs, broken, valid, a)
    along = scan(drift, valid, a)
    rewards = candidate_rewards(
        student.logprobs.gather(-1, student_topk_ids),
        teacher.logprobs.gather(-1, student_topk_ids),
        torch.ones_like(student_topk_ids, dtype=torch.bool),
        a.reward_weight,
    )
    rewards = weighted(along.weight[..., None].to(torch.float64), rewards)
    dtype = float_type(a.student_logits, a.teacher_logits)
    return Reliability(overlap, drift, *along, student_topk_ids, rewards.to(dtype))

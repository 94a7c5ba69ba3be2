"""Reliability and rewards from both sides' logits (eq. 6-12, 14-16); with entropies and KL for a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas import (
    Rows,
    candidate_rewards,
    filled_slots,
    float_type,
    overlap_and_drift,
    read_rows,
    scan,
    topk_ids,
    valid_positions,
    weighted,
)
from ..ops import Reliability


class Scored(NamedTuple):
    """What `reliability` returns, and what a loss is made of."""

    reliability: Reliability
    accepted: Tensor
    student: Rows
    teacher: Rows
    valid: Tensor


def reliability(a: Any) -> Reliability:
    return score(a, None).reliability


@torch.no_grad()
def score(a: Any, weight: Tensor | None) -> Scored:
    """Score the positions; a weight takes the place of L in the rewards."""
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    student = read_rows(a.student_logits, valid, a.vocab_size, a.student_temperature)
    teacher = read_rows(a.teacher_logits, valid, a.vocab_size, a.teacher_temperature)
    student_topk_ids, teacher_topk_ids = (topk_ids(rows.logits, a.k) for rows in (student, teacher))
    slots = filled_slots(student, student_topk_ids)
    overlap, drift, accepted = overlap_and_drift(
        slots,
        filled_slots(teacher, teacher_topk_ids),
        teacher.logprobs.gather(-1, teacher_topk_ids),
        student.broken | teacher.broken,
        valid,
        a,
    )
    along = scan(drift, valid, a)
    # Not only the filled slots: a broken row has none, and its rewards are NaN.
    rewards = candidate_rewards(
        student.logprobs.gather(-1, student_topk_ids),
        teacher.logprobs.gather(-1, student_topk_ids),
        (slots >= 0) | student.broken[..., None],
        a.reward_weight,
    )
    weight = along.weight if weight is None else weight
    rewards = weighted(torch.where(valid, weight, 0.0).to(torch.float64)[..., None], rewards)
    dtype = float_type(a.student_logits, a.teacher_logits)
    outputs = Reliability(overlap, drift, *along, student_topk_ids, rewards.to(dtype))
    return Scored(outputs, accepted, student, teacher, valid)

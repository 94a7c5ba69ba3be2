"""Overlap, drift, reliability and rewards, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from ..formulas import candidate_rewards, float_type, overlap_and_drift, valid_positions, weighted
from ..ops import Reliability, reliability_from_drift
from ._agreement import Slices
from ._exchange import gather
from ._rows import candidates_where, whole_rows
from ._slice import logits_of_ids, pair_of


@torch.no_grad()
def reliability(slices: Slices, a: Any) -> Reliability:
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    dtype = float_type(a.student_logits, a.teacher_logits)
    pair = pair_of(slices, a, valid, a.k)
    on_student = logits_of_ids(slices, a.teacher_logits, pair.student.topk_ids, valid)
    sent = gather(slices, valid.shape, dtype, *pair.student, on_student, *pair.teacher)
    student, (logits, topk_ids, on_student) = whole_rows(slices, a.k, a.student_temperature, *sent[:4])
    teacher, (teacher_logits, teacher_topk_ids) = whole_rows(slices, a.k, a.teacher_temperature, *sent[4:])

    teacher_topk_logprobs = teacher.logprobs(teacher_logits)
    broken = student.broken | teacher.broken
    overlap, drift = overlap_and_drift(topk_ids, teacher_topk_ids, teacher_topk_logprobs, broken, valid, a)
    along = reliability_from_drift(
        drift, a.mask, cu_seqlens=a.cu_seqlens, drift_count=a.drift_count,
        w_drop=a.w_drop, w_base=a.w_base, eps=a.eps, impl=slices.given["impl"],
    )  # fmt: skip
    exists = torch.ones_like(topk_ids, dtype=torch.bool)
    rewards = candidate_rewards(student.logprobs(logits), teacher.logprobs(on_student), exists, a.reward_weight)
    rewards = weighted(along.weight[..., None].to(torch.float64), rewards).to(dtype)
    return Reliability(overlap, drift, *along, candidates_where(valid, topk_ids), rewards)

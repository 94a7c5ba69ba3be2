"""Reliability from both sides' candidates (eq. 6-10, 12, 14-16)."""

from typing import Any

import torch

from ..formulas import filled_from_outside, overlap_and_drift, scan, valid_positions
from ..ops import ReliabilityFromTopk


@torch.no_grad()
def reliability_from_topk(a: Any) -> ReliabilityFromTopk:
    valid = valid_positions(a.mask, a.student_topk_ids, a.student_topk_ids.shape[:-1])
    student = filled_from_outside(a.student_topk_ids, a.student_topk_logprobs)
    teacher = filled_from_outside(a.teacher_topk_ids, a.teacher_topk_logprobs)
    broken = torch.zeros_like(valid)
    overlap, drift, _ = overlap_and_drift(student, teacher, a.teacher_topk_logprobs, broken, valid, a)
    return ReliabilityFromTopk(overlap, drift, *scan(drift, valid, a))

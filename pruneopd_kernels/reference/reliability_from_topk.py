"""Reliability from both sides' candidates (eq. 6-10, 12, 14-16)."""

from __future__ import annotations

from typing import Any

import torch

from ..formulas import overlap_and_drift, scan, valid_positions
from ..ops import ReliabilityFromTopk


@torch.no_grad()
def reliability_from_topk(a: Any) -> ReliabilityFromTopk:
    valid = valid_positions(a.mask, a.student_topk_ids, a.student_topk_ids.shape[:-1])
    broken = torch.zeros_like(valid)
    candidates = a.student_topk_ids, a.teacher_topk_ids, a.teacher_topk_logprobs
    overlap, drift = overlap_and_drift(*candidates, broken, valid, a)
    return ReliabilityFromTopk(overlap, drift, *scan(drift, valid, a))

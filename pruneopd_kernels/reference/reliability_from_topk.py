"""Reliability where both sides' candidates are known (eq. 6-10, 12, 14-16)."""

from __future__ import annotations

from typing import Any

import torch

from ..formulas import accepted, overlap_count, overlap_of, scan, valid_positions
from ..ops import ReliabilityFromTopk


@torch.no_grad()
def reliability_from_topk(a: Any) -> ReliabilityFromTopk:
    """The definition of `pruneopd_kernels.reliability_from_topk`."""
    k = a.student_topk_ids.shape[-1]
    valid = valid_positions(a.mask, a.student_topk_ids, a.student_topk_ids.shape[:-1])
    overlap = overlap_of(overlap_count(a.student_topk_ids, a.teacher_topk_ids), k)
    if a.metric == "overlap":
        drift = overlap < a.threshold
    else:
        assert a.token_ids is not None
        assert a.teacher_topk_logprobs is not None
        drift = ~accepted(a.token_ids, a.teacher_topk_ids, a.teacher_topk_logprobs, a.top_p)
    drift = drift & valid
    return ReliabilityFromTopk(
        torch.where(valid, overlap, 0.0).to(torch.float32),
        drift,
        *scan(drift, valid, a.cu_seqlens, a.drift_count, a.w_drop, a.w_base, a.eps),
    )

"""Reliability where both sides' candidates are known (eq. 6-10, 12, 14-16)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Metric
from ..formulas import accepted, overlap_count, overlap_of, scan, valid_positions
from ..results import ReliabilityFromTopk
from ._checking import check


@torch.no_grad()
def reliability_from_topk(
    student_topk_ids: Tensor,
    teacher_topk_ids: Tensor,
    mask: Tensor | None = None,
    *,
    teacher_topk_logprobs: Tensor | None = None,
    token_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    threshold: float = 0.7,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    metric: Metric = "overlap",
    top_p: float = 0.95,
) -> ReliabilityFromTopk:
    """The definition of `pruneopd_kernels.reliability_from_topk`."""
    check(
        "reliability_from_topk",
        student_topk_ids=student_topk_ids,
        teacher_topk_ids=teacher_topk_ids,
        mask=mask,
        teacher_topk_logprobs=teacher_topk_logprobs,
        token_ids=token_ids,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        threshold=threshold,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
        metric=metric,
        top_p=top_p,
    )
    k = student_topk_ids.shape[-1]
    valid = valid_positions(mask, student_topk_ids, student_topk_ids.shape[:-1])
    overlap = overlap_of(overlap_count(student_topk_ids, teacher_topk_ids), k)
    if metric == "overlap":
        drift = overlap < threshold
    else:
        assert token_ids is not None
        assert teacher_topk_logprobs is not None
        drift = ~accepted(token_ids, teacher_topk_ids, teacher_topk_logprobs, top_p)
    drift = drift & valid
    return ReliabilityFromTopk(
        torch.where(valid, overlap, 0.0).to(torch.float32),
        drift,
        *scan(drift, valid, cu_seqlens, drift_count, w_drop, w_base, eps),
    )

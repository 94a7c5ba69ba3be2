"""Reliability and rewards from both sides' logits (eq. 6-12, 14-16)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Metric, RewardWeight
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
from ..results import Reliability
from ._checking import check


@torch.no_grad()
def reliability(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    k: int = 16,
    threshold: float = 0.7,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    metric: Metric = "overlap",
    top_p: float = 0.95,
    reward_weight: RewardWeight = "student",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Reliability:
    """The definition of `pruneopd_kernels.reliability`."""
    check(
        "reliability",
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        token_ids=token_ids,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        k=k,
        threshold=threshold,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
        metric=metric,
        top_p=top_p,
        reward_weight=reward_weight,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    valid = valid_positions(mask, student_logits, student_logits.shape[:-1])
    student = read_rows(student_logits, valid, vocab_size, student_temperature)
    teacher = read_rows(teacher_logits, valid, vocab_size, teacher_temperature)
    student_topk_ids, teacher_topk_ids = (topk_ids(rows.logits, k) for rows in (student, teacher))
    broken = student.broken | teacher.broken

    overlap = overlap_of(overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(broken, 0), k)
    if metric == "overlap":
        drift = overlap < threshold
    else:
        assert token_ids is not None
        teacher_topk_logprobs = teacher.logprobs.gather(-1, teacher_topk_ids)
        drift = ~accepted(token_ids, teacher_topk_ids, teacher_topk_logprobs, top_p) | broken
    drift = drift & valid
    along = scan(drift, valid, cu_seqlens, drift_count, w_drop, w_base, eps)

    rewards = candidate_rewards(
        student.logprobs.gather(-1, student_topk_ids),
        teacher.logprobs.gather(-1, student_topk_ids),
        torch.ones_like(student_topk_ids, dtype=torch.bool),
        reward_weight,
    )
    return Reliability(
        torch.where(valid, overlap, 0.0).to(torch.float32),
        drift,
        *along,
        student_topk_ids,
        weighted(along.weight[..., None].to(torch.float64), rewards).to(float_type(student_logits, teacher_logits)),
    )

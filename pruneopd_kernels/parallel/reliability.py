"""`parallel.reliability`: overlap, drift, reliability and rewards, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..checks import Metric, RewardWeight
from ..formulas import (
    accepted,
    candidate_rewards,
    float_type,
    overlap_count,
    overlap_of,
    valid_positions,
    weighted,
)
from ..ops import Reliability, reliability_from_drift
from ..ops._operator import Impl
from ._agreement import agree
from ._exchange import gather, outside_graphs
from ._rows import candidates_where, first_candidates, softmax_of
from ._slice import logits_of_ids, pair_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@outside_graphs
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
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
) -> Reliability:
    """`pruneopd_kernels.reliability` over a vocabulary that is split over the ranks of a group (eq. 6-12, 14-16).

    Every rank calls it, with its slice of the logits and with all else equal, and gets the whole answer. Two exchanges:
    32 bytes a rank to agree, then 4 bytes times `5 * k + 2` for each position and rank.

    Args:
        student_logits: float32, bfloat16 or float16 `[B, T, V_r]` (padded) or `[N, V_r]` (packed): this rank's slice,
            of any width, 0 too. Slices are contiguous and in the order of the ranks. Stride 1 on the last axis, any
            other strides.
        teacher_logits: the same ids of the teacher; the dtype may differ, and so may the width beyond vocab_size.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. None: all are valid.
        token_ids: int32 or int64 `[B, T]` or `[N]`, ids of the whole vocabulary; for `metric="top_p"`.
        cu_seqlens: int32 `[B + 1]`, required exactly when positions are packed.
        drift_count: int32 `[B]`, what C starts from.
        k: Candidates per position, 1 to min(vocab_size, 256), however narrow the slices are.
        threshold: A position drifts where its overlap is below this, in (0, 1].
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus, in (0, 1].
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.
        student_temperature: What the student's logits are divided by, > 0.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist, of the whole vocabulary. None: the widths of all slices together.
        impl: Implementation to use for the slice; an explicit one runs or raises.
        group: Group of `torch.distributed` whose ranks hold the slices. None: all ranks.

    Returns:
        `Reliability` of the whole vocabulary, on every rank. All but the rewards is what one rank would get, bit for
        bit; rewards are as accurate. None is differentiable.

    Raises:
        ValueError: On every rank: a shape or a value is not allowed on some rank, or differs between ranks.
        TypeError: The same of a dtype.
        RuntimeError: The implementation is not usable on some rank.
    """
    slices = agree(
        "reliability",
        group,
        {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "mask": mask,
            "token_ids": token_ids,
            "cu_seqlens": cu_seqlens,
            "drift_count": drift_count,
            "k": k,
            "threshold": threshold,
            "w_drop": w_drop,
            "w_base": w_base,
            "eps": eps,
            "metric": metric,
            "top_p": top_p,
            "reward_weight": reward_weight,
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
            "vocab_size": vocab_size,
            "impl": impl,
        },
    )
    valid = valid_positions(mask, student_logits, student_logits.shape[:-1])
    dtype = float_type(student_logits, teacher_logits)
    pair = pair_of(slices, student_logits, teacher_logits, valid, k, student_temperature, teacher_temperature, impl)
    teacher_on_student_logits = logits_of_ids(slices, teacher_logits, pair.student.topk_ids, valid)
    everyone = gather(_Record(*pair.student, teacher_on_student_logits, *pair.teacher), slices, valid.shape, dtype)

    student = softmax_of(everyone.student_topk_logits[..., 0], everyone.student_log_mass, student_temperature)
    teacher = softmax_of(everyone.teacher_topk_logits[..., 0], everyone.teacher_log_mass, teacher_temperature)
    logits, topk_ids, other_logits = first_candidates(
        slices, k, everyone.student_topk_logits, everyone.student_topk_ids, everyone.teacher_on_student_logits
    )
    teacher_topk_logits, teacher_topk_ids = first_candidates(
        slices, k, everyone.teacher_topk_logits, everyone.teacher_topk_ids
    )
    broken = student.broken | teacher.broken
    overlap = overlap_of(overlap_count(topk_ids, teacher_topk_ids).masked_fill(broken, 0), k)
    if metric == "overlap":
        drift = overlap < threshold
    else:
        assert token_ids is not None
        drift = ~accepted(token_ids, teacher_topk_ids, teacher.logprobs(teacher_topk_logits), top_p) | broken
    drift = drift & valid
    along = reliability_from_drift(
        drift,
        mask,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
        impl=impl,
    )
    rewards = candidate_rewards(
        student.logprobs(logits),
        teacher.logprobs(other_logits),
        torch.ones_like(topk_ids, dtype=torch.bool),
        reward_weight,
    )
    return Reliability(
        torch.where(valid, overlap, 0.0).to(torch.float32),
        drift,
        *along,
        candidates_where(valid, topk_ids),
        weighted(along.weight[..., None].to(torch.float64), rewards).to(dtype),
    )


class _Record(NamedTuple):
    """What a rank tells of its slice, per position."""

    student_topk_ids: Tensor
    student_topk_logits: Tensor
    student_log_mass: Tensor
    teacher_on_student_logits: Tensor
    teacher_topk_ids: Tensor
    teacher_topk_logits: Tensor
    teacher_log_mass: Tensor

"""`reliability_from_topk`: along a response, from both sides' candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import Metric
from ..results import ReliabilityFromTopk
from ._implementations import Impl
from ._registration import Outputs, call, register
from .reliability_from_drift import empty_scan


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
    impl: Impl = "auto",
) -> ReliabilityFromTopk:
    """Reliability along each response where the candidates are known already, for instance from a teacher's server.

    With S and T the student's and the teacher's candidates at a position (Prune-OPD, arXiv:2605.07804)

        O = |S & T| / k                                          (6)
        B = O < threshold                  metric="overlap"      (7)
        B = token_id not in nucleus(T)     metric="top_p"        (14-16)

    where the nucleus is the shortest prefix of T whose mass reaches `top_p` (to within 1e-6), or all of T. C, R, L and
    E follow as in `reliability_from_drift`. A masked position has overlap 0 and does not drift.

    The candidates stay in the caller's order. An id below 0 is padding: it matches nothing and its log-probability is
    ignored. A log-probability of -inf has no mass; where another one is NaN, no token is accepted.

    Args:
        student_topk_ids: int32 or int64 `[B, T, k]` (padded) or `[N, k]` (packed), k from 1 to 256.
        teacher_topk_ids: int32 or int64 of the same shape, the most probable first where `metric="top_p"`.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. Holes are allowed. None: all
            positions are valid.
        teacher_topk_logprobs: float `[..., k]`, natural logarithms, of the teacher's candidates; for `metric="top_p"`.
        token_ids: int32 or int64 `[B, T]` or `[N]`, the response's tokens; for `metric="top_p"`.
        cu_seqlens: int32 `[B + 1]`, required exactly when positions are packed: response b is `cu_seqlens[b]` to
            `cu_seqlens[b + 1]`; starts at 0, ends at N, does not decrease.
        drift_count: int32 `[B]`, >= 0: what C starts from, for a response that comes in chunks (see
            `next_drift_count`). None: 0.
        threshold: A position drifts where its overlap is below this, in (0, 1]; compared in float64 on the exact count.
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus, in (0, 1].
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        `overlap` (O) float32, `drift` (B) bool, `drift_count` (C) int32, `reliability` (R) float32 and `weight` (L)
        float32 per position, and `effective_length` (E) int32 `[B]`. None is differentiable.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import reliability_from_topk
        >>> student = torch.tensor([[[4, 2], [7, 1], [5, 3]]])
        >>> teacher = torch.tensor([[[2, 4], [7, 0], [8, 9]]])
        >>> out = reliability_from_topk(student, teacher)
        >>> out.overlap
        tensor([[1.0000, 0.5000, 0.0000]])
        >>> out.drift_count
        tensor([[0, 1, 2]], dtype=torch.int32)
    """
    outputs = call(
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
        impl=impl,
    )
    return ReliabilityFromTopk(*outputs)


def _fake(*, student_topk_ids: Tensor, cu_seqlens: Tensor | None, **_: Any) -> Outputs:
    per_position = student_topk_ids.shape[:-1]
    return (
        student_topk_ids.new_empty(per_position, dtype=torch.float32),
        student_topk_ids.new_empty(per_position, dtype=torch.bool),
        *empty_scan(student_topk_ids, per_position, cu_seqlens),
    )


register("reliability_from_topk", _fake)

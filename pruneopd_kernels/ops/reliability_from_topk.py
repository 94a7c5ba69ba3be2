"""`reliability_from_topk`: along a response, from both sides' candidates."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import checks
from ..checks import Metric
from ..config import PruneConfig
from ._operator import Impl, Tensor, operator


@operator
def reliability_from_topk(
    student_topk_ids: Tensor,
    teacher_topk_ids: Tensor,
    mask: Tensor | None = None,
    *,
    student_topk_logprobs: Tensor | None = None,
    teacher_topk_logprobs: Tensor | None = None,
    token_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    threshold: float = PruneConfig.threshold,
    w_drop: float = PruneConfig.w_drop,
    w_base: float = PruneConfig.w_base,
    eps: float = PruneConfig.eps,
    metric: Metric = PruneConfig.metric,
    top_p: float = PruneConfig.top_p,
    impl: Impl = "auto",
) -> ReliabilityFromTopk:
    """Reliability along each response where the candidates are known already, for instance from a teacher's server.

    With S and T the student's and the teacher's candidates at a position (Prune-OPD, arXiv:2605.07804)

        O = |S & T| / max(|S|, |T|)                                          (6)
        B = O < threshold                  metric="overlap"      (7)
        B = token_id not in nucleus(T)     metric="top_p"        (14-16)

    where the nucleus is the shortest prefix of T whose mass reaches `top_p` (to within 1e-6), or all of T. C, R, L and
    E follow as in `reliability_from_drift`. A masked position has overlap 0 and does not drift.

    The candidates stay in the caller's order. A slot with an id below 0, or with a log-probability of -inf if they are
    given, is empty: it matches nothing, has no mass, and is not counted in |S| or |T|. Where the log-probability of a
    filled slot is NaN, no token is accepted. Arguments that `reliability` has, too, mean the same.

    Args:
        student_topk_ids: int32 or int64 `[B, T, k]` (padded) or `[N, k]` (packed), k from 1 to 256; no id twice among
            the filled slots of a position (on a GPU, where values are not checked, the first counts).
        teacher_topk_ids: int32 or int64 of the same shape, the most probable first where `metric="top_p"`.
        student_topk_logprobs: float `[..., k]`, natural logarithms, of the student's candidates: -inf marks an empty
            slot. None: an id below 0 does.
        teacher_topk_logprobs: the same of the teacher's candidates; for `metric="top_p"`.
        token_ids: int32 or int64 `[B, T]` or `[N]`, the response's tokens; for `metric="top_p"`.

    Returns:
        `overlap` (O) float32, `drift` (B) bool, `drift_count` (C) int32, `reliability` (R) float32 and `weight` (L)
        float32 per position, and `effective_length` (E) int32 `[B]`. None is differentiable.

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
    ...


class ReliabilityFromTopk(NamedTuple):
    """Of `reliability_from_topk`: those fields of `Reliability` that need no logits."""

    overlap: Tensor
    drift: Tensor
    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    ids = a.student_topk_ids
    if ids.ndim not in (2, 3) or not 1 <= ids.shape[-1] <= checks.MAX_K:
        rule = f"have shape [B, T, k] or [N, k] with 1 <= k <= {checks.MAX_K}"
        checks.bad_value(op, "student_topk_ids", rule, list(ids.shape))
    checks.has_dtype(op, "student_topk_ids", ids, checks.IDS)
    checks.has_one_for_each(op, "teacher_topk_ids", a.teacher_topk_ids, ids, ids.shape, checks.IDS)
    positions = ids.shape[:-1]
    checks.mask_of_positions(op, a.mask, ids, positions)
    checks.has_one_for_each(op, "student_topk_logprobs", a.student_topk_logprobs, ids, ids.shape)
    checks.has_one_for_each(op, "teacher_topk_logprobs", a.teacher_topk_logprobs, ids, ids.shape)
    checks.ids_of_positions(op, a.token_ids, ids, positions)
    checks.responses(op, a.cu_seqlens, a.drift_count, ids, positions, "student_topk_ids are {}, k]")
    checks.scalars(op, a)
    checks.needed_by_top_p(op, a, "teacher_topk_logprobs", "token_ids")
    if values:
        if float64:  # the reference
            check_distinct(op, a)
        checks.response_values(op, a.cu_seqlens, a.drift_count, positions)


def check_distinct(op: str, a: Any) -> None:
    """Raise if an id is twice among the filled slots of a position."""
    checks.distinct(op, "student_topk_ids", a.student_topk_ids, a.student_topk_logprobs, a.mask)
    checks.distinct(op, "teacher_topk_ids", a.teacher_topk_ids, a.teacher_topk_logprobs, a.mask)


def check_results(op: str, a: Any, overlap: Any) -> None:
    """Raise if the kernel has found an id twice; on a CPU it marks the position by an overlap of NaN.

    Looking for it before would cost many times what the operator does.
    """
    if (overlap != overlap).any():
        check_distinct(op, a)


def fake(a: Any, empty: Any) -> Any:
    return empty("float32"), empty("bool"), *empty.scan(a.cu_seqlens)

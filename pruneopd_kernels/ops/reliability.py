"""`reliability`: overlap, drift, reliability along the response and weighted rewards, from both sides' logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import Metric, RewardWeight
from ..reference._rows import float_type
from ..results import Reliability
from ._implementations import Impl
from ._registration import Outputs, call, register
from .reliability_from_drift import empty_scan


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
) -> Reliability:
    """How far the teacher can be trusted at each position of each response, and the rewards that follow.

    With p and q the student's and the teacher's distributions at a position, S and T their k most probable ids
    (Prune-OPD, arXiv:2605.07804)

        O = |S & T| / k                                          (6)
        B = O < threshold                  metric="overlap"      (7)
        B = token_id not in nucleus(T)     metric="top_p"        (14-16)
        C = number of drifts so far                              (8)
        R = clip(1 - w_drop * C, 0, 1)                           (9)
        L = R + w_base                                           (10)
        reward[j] = L * w[j] * (log q[j] - log p[j]), j in S     (11)
        E = number of positions with R > eps                     (12)

    where the nucleus is the shortest prefix of T whose mass reaches `top_p` (to within 1e-6), or all of T, and w is p
    renormalised over S, or q, or 1/k. Every logit is read once; nothing of the vocabulary's size is written.

    A row with a NaN, a +inf or no finite logit makes its position one of overlap 0 that drifts and whose rewards are
    NaN. A logit of -inf is an ordinary one: where only log q is -inf the reward is -inf, where log p is, it is 0.
    Rewards are 0 wherever L is 0. At a masked position the logits are never read: floats are 0, drift is False,
    candidates are 0 .. k-1, and C is that of the position before.

    Args:
        student_logits: float32, bfloat16 or float16 `[B, T, V]` (padded) or `[N, V]` (packed); stride 1 on the last
            axis, any other strides: `logits[:, :-1]` is taken without a copy.
        teacher_logits: the same but for V and the dtype, which may differ.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. Holes are allowed. None: all
            positions are valid.
        token_ids: int32 or int64 `[B, T]` or `[N]`, the response's tokens, in `[0, vocab_size)` where valid; for
            `metric="top_p"`.
        cu_seqlens: int32 `[B + 1]`, required exactly when positions are packed: response b is `cu_seqlens[b]` to
            `cu_seqlens[b + 1]`; starts at 0, ends at N, does not decrease.
        drift_count: int32 `[B]`, >= 0: what C starts from, for a response that comes in chunks (see
            `next_drift_count`). None: 0.
        k: Candidates per position, 1 to min(vocab_size, 256).
        threshold: A position drifts where its overlap is below this, in (0, 1]; compared in float64 on the exact count.
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus, in (0, 1].
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.
        student_temperature: What the student's logits are divided by, > 0. The order of candidates does not change.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist, for the candidates and for the softmax; required where the last axes
            differ, as the padded heads of two models with one tokenizer often do. None: V.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        `overlap` (O) float32, `drift` (B) bool, `drift_count` (C) int32, `reliability` (R) float32 and `weight` (L)
        float32 per position, `effective_length` (E) int32 `[B]`, `topk_ids` (S) int64 and `rewards` float32
        `[..., k]`. None is differentiable. Candidates are in descending order of logit; of equal logits the lower id
        comes first, -0 equals +0, and a NaN comes before everything.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import reliability
        >>> student = torch.randn(2, 5, 100)
        >>> reliability(student, student, k=4).overlap[0]
        tensor([1., 1., 1., 1., 1.])
        >>> out = reliability(student, -student, k=4, w_drop=0.25)  # opposite preferences: every position drifts
        >>> out.reliability[0]
        tensor([0.7500, 0.5000, 0.2500, 0.0000, 0.0000])
        >>> out.effective_length
        tensor([3, 3], dtype=torch.int32)
    """
    outputs = call(
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
        impl=impl,
    )
    return Reliability(*outputs)


def _fake(*, student_logits: Tensor, teacher_logits: Tensor, cu_seqlens: Tensor | None, k: int, **_: Any) -> Outputs:
    per_position = student_logits.shape[:-1]
    new = student_logits.new_empty
    return (
        new(per_position, dtype=torch.float32),
        new(per_position, dtype=torch.bool),
        *empty_scan(student_logits, per_position, cu_seqlens),
        new((*per_position, k), dtype=torch.int64),
        new((*per_position, k), dtype=float_type(student_logits, teacher_logits)),
    )


register("reliability", _fake)

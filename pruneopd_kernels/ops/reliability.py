"""`reliability`: overlap, drift, reliability along the response and weighted rewards, from both sides' logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import checks
from ..checks import Metric, RewardWeight
from ..config import PruneConfig
from ._operator import Impl, Tensor, operator


@operator
def reliability(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    k: int = PruneConfig.k,
    threshold: float = PruneConfig.threshold,
    w_drop: float = PruneConfig.w_drop,
    w_base: float = PruneConfig.w_base,
    eps: float = PruneConfig.eps,
    metric: Metric = PruneConfig.metric,
    top_p: float = PruneConfig.top_p,
    reward_weight: RewardWeight = PruneConfig.reward_weight,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> Reliability:
    """How far the teacher can be trusted at each position of each response, and the rewards that follow.

    With p and q the student's and the teacher's distributions at a position, S and T their k most probable ids
    (Prune-OPD, arXiv:2605.07804)

        O = |S & T| / max(|S|, |T|)                              (6)
        B = O < threshold                  metric="overlap"      (7)
        B = token_id not in nucleus(T)     metric="top_p"        (14-16)
        C = number of drifts so far                              (8)
        R = clip(1 - w_drop * C, 0, 1)                           (9)
        L = R + w_base                                           (10)
        reward[j] = L * w[j] * (log q[j] - log p[j]), j in S     (11)
        E = number of positions with R > eps                     (12)

    where the nucleus is the shortest prefix of T whose mass reaches `top_p` (to within 1e-6), or all of T, and w is p
    renormalised over S, or q, or 1/|S|. Each logit is read once; no vocabulary-sized tensor is written.

    A row with a NaN, a +inf or no finite logit makes its position one of overlap 0 that drifts and whose rewards are
    NaN. A logit of -inf means that the token does not exist: it is never a candidate. Where a row has fewer than k
    others, the last slots are empty: they hold the next ids, match nothing and have reward 0, and |S| and |T| count the
    filled slots. Where log q = -inf < log p the reward is -inf. Rewards are 0 wherever L is 0. At a masked position the
    logits are never read: floats are 0, drift is False, candidates are 0 .. k-1, and C is that of the position before.

    Args:
        student_logits: float32, bfloat16 or float16 `[B, T, V]` (padded) or `[N, V]` (packed); stride 1 on the last
            axis, any other strides: `logits[:, :-1]` is taken without a copy.
        teacher_logits: the same except for V and the dtype, which may differ.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. Holes are allowed. None: all
            positions are valid.
        token_ids: int32 or int64 `[B, T]` or `[N]`, the response's tokens, in `[0, vocab_size)` where valid; for
            `metric="top_p"`.
        cu_seqlens: int32 or int64 `[B + 1]`, required exactly when positions are packed: response b is `cu_seqlens[b]`
            to `cu_seqlens[b + 1]`; starts at 0, ends at N, does not decrease.
        drift_count: int32 `[B]`, >= 0: what C starts from, for a response that comes in chunks (see
            `next_drift_count`). None: 0.
        k: Candidates per position, 1 to min(vocab_size, 256).
        threshold: A position drifts where its overlap is below this, in (0, 1]; compared in float64 on the exact count.
        w_drop: Reliability lost with each drift, >= 0.
        w_base: What is added to the reliability to give the weight, >= 0.
        eps: A position counts towards E where its R exceeds this, >= 0.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus, in (0, 1]; 1 means all candidates.
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.
        student_temperature: What the student's logits are divided by, > 0. The order of candidates does not change.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist, for the candidates and for the softmax; required where the last axes
            differ, as the padded heads of two models with one tokenizer often do. None: V.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        The fields of `Reliability`. None is differentiable. Candidates are in descending order of logit; of equal
        logits the lower id comes first, -0 equals +0, and a NaN comes before everything.

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
    ...


class Reliability(NamedTuple):
    """Of `reliability`. Per position means `[B, T]`, or `[N]` where responses are packed."""

    overlap: Tensor
    """float32 per position: O, the common share of both top-k (eq. 6)."""
    drift: Tensor
    """bool per position: B, whether the position drifts (eq. 7, or 14-16)."""
    drift_count: Tensor
    """int32 per position: C, how many positions of the response have drifted so far (eq. 8)."""
    reliability: Tensor
    """float32 per position: R, in [0, 1] (eq. 9)."""
    weight: Tensor
    """float32 per position: L, what the rewards are weighted by (eq. 10)."""
    effective_length: Tensor
    """int32 `[B]`: E, the number of positions that are still reliable (eq. 12)."""
    topk_ids: Tensor
    """int64 `[..., k]`: the student's candidates in order."""
    rewards: Tensor
    """float32 `[..., k]`: of those candidates, weighted by L (eq. 11)."""


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    logits = a.student_logits
    if logits.ndim not in (2, 3):
        checks.bad_value(op, "student_logits", "have shape [B, T, V] or [N, V]", list(logits.shape))
    checks.logits(op, "student_logits", logits, float64)
    checks.logits(op, "teacher_logits", a.teacher_logits, float64, like=logits)
    positions = logits.shape[:-1]
    checks.mask_of_positions(op, a.mask, logits, positions)
    checks.ids_of_positions(op, a.token_ids, logits, positions)
    checks.responses(op, a.cu_seqlens, a.drift_count, logits, positions, "student_logits are {}, V]")
    vocab_size = checks.vocab_size(op, a)
    checks.number_of_candidates(op, a.k, vocab_size)
    checks.scalars(op, a)
    checks.needed_by_top_p(op, a, "token_ids")
    if values:
        if a.metric == "top_p":
            checks.token_id_values(op, a.token_ids, a.mask, vocab_size)
        checks.response_values(op, a.cu_seqlens, a.drift_count, positions)


def fake(a: Any, empty: Any) -> Any:
    scan = empty.scan(a.cu_seqlens)
    return empty("float32"), empty("bool"), *scan, empty("int64", a.k), empty("logits", a.k)

"""Rewards over the candidates of either side, or of both, from what `token_stats` returns."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import checks
from .checks import RewardWeight
from .formulas import candidate_rewards, filled_from_outside, found_in, has_values, valid_positions, weighted

Strategy = Literal["student", "teacher", "intersection", "union", "symmetric_difference"]


class OpdRewards(NamedTuple):
    """Of `opd_rewards`. The number of candidates m is k, or 2k where the strategy takes both sides."""

    ids: Tensor
    """int64 `[..., m]`: the candidates."""
    rewards: Tensor
    """float `[..., m]`: their rewards, 0 where not valid."""
    valid: Tensor
    """bool `[..., m]`: whether the strategy takes the candidate."""


@torch.no_grad()
def opd_rewards(
    student_topk_ids: Tensor,
    student_topk_logprobs: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    teacher_on_student_logprobs: Tensor | None = None,
    student_on_teacher_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    strategy: Strategy = "student",
    reward_weight: RewardWeight = "student",
    weight: Tensor | None = None,
) -> OpdRewards:
    """Return the on-policy-distillation rewards of the candidates that a strategy takes.

    With S and T the student's and the teacher's candidates and p and q their probabilities (Prune-OPD,
    arXiv:2605.07804)

        reward[j] = L * w[j] * (log q[j] - log p[j])    (11)

    | strategy | candidates | taken |
    |---|---|---|
    | `student` | S | all |
    | `teacher` | T | all |
    | `intersection` | S | those in T |
    | `union` | S, then T | S, and those of T not in S |
    | `symmetric_difference` | S, then T | those in one only |

    where w is p renormalised over the candidates taken, or q, or 1 over their number; for `symmetric_difference`
    nothing is renormalised, and w is p, q or 1. A slot is empty, and never taken, if its id is below 0 or its own
    log-probability (log p of S, log q of T) is -inf. As in `reliability`, a reward is 0 where log q == log p, where
    log p is -inf and where no mass is there to renormalise, -inf where only log q is -inf, NaN where either is.

    The first six arguments are the first six fields of `TokenStats`, so that `opd_rewards(*stats[:6])` works, and with
    `weight` gives the rewards of `reliability`. Of ids that come twice in a position, which the CPU refuses, a GPU
    takes the first.

    Args:
        student_topk_ids: int32 or int64 `[..., k]`: S.
        student_topk_logprobs: float `[..., k]`: log p of S.
        teacher_topk_ids: int32 or int64 `[..., k]`: T.
        teacher_topk_logprobs: float `[..., k]`: log q of T.
        teacher_on_student_logprobs: float `[..., k]`: log q of S; for `student`, `union`, `symmetric_difference`.
        student_on_teacher_logprobs: float `[..., k]`: log p of T; for `teacher`, `union`, `symmetric_difference`.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        strategy: Which candidates are taken.
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.
        weight: float `[...]`: L, which multiplies; where it is 0 so are the rewards. None: 1.

    Returns:
        `ids` int64, `rewards` float32 (float64 if any log-probability is) and `valid` bool, each `[..., m]` with m = k
        or, for `union` and `symmetric_difference`, 2k. Rewards are 0 where not valid. None is differentiable.

    Raises:
        ValueError: A shape or a value is not allowed, an id comes twice among the slots of one side that are not empty,
            or the strategy needs a tensor that was not given.
        TypeError: A dtype is not allowed.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import opd_rewards, token_stats
        >>> student, teacher = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> stats = token_stats(student, teacher, k=2)
        >>> opd_rewards(*stats[:6])
        OpdRewards(ids=tensor([[1, 2]]), rewards=tensor([[ 0.0000, -0.2689]]), valid=tensor([[True, True]]))
        >>> opd_rewards(*stats[:6], strategy="union").ids
        tensor([[1, 2, 1, 0]])
        >>> opd_rewards(*stats[:6], strategy="union").valid
        tensor([[ True,  True, False,  True]])
    """
    if not torch.compiler.is_compiling():
        _check(**locals())
    from_student, from_teacher = student_topk_ids.to(torch.int64), teacher_topk_ids.to(torch.int64)
    slots_s = filled_from_outside(from_student, student_topk_logprobs)
    slots_t = filled_from_outside(from_teacher, teacher_topk_logprobs)
    taken_s, taken_t = slots_s >= 0, slots_t >= 0
    if strategy == "intersection":
        match = _first_match(slots_s, slots_t)
        taken_s, teacher_on_student_logprobs = match >= 0, teacher_topk_logprobs.gather(-1, match.clamp(min=0))
    if strategy in ("union", "symmetric_difference"):
        taken_t = taken_t & ~found_in(slots_t, slots_s)
    if strategy == "symmetric_difference":
        taken_s = taken_s & ~found_in(slots_s, slots_t)

    of_student: Any = from_student, taken_s, student_topk_logprobs, teacher_on_student_logprobs
    of_teacher: Any = from_teacher, taken_t, student_on_teacher_logprobs, teacher_topk_logprobs
    one_side = {"student": of_student, "teacher": of_teacher, "intersection": of_student}.get(strategy)
    ids, valid, a, b = one_side or (torch.cat(both, -1) for both in zip(of_student, of_teacher, strict=True))

    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    valid = valid & valid_positions(mask, ids, ids.shape[:-1])[..., None]
    renormalise = strategy != "symmetric_difference"
    rewards = candidate_rewards(a.to(torch.float64), b.to(torch.float64), valid, reward_weight, renormalise)
    if weight is not None:
        rewards = weighted(weight[..., None].to(torch.float64), rewards)
    return OpdRewards(ids, rewards.to(dtype), valid)


def _first_match(ids: Tensor, among: Tensor) -> Tensor:
    """Return the first slot of `among` that holds each id; -1 where there is none, and for an empty slot."""
    match = torch.full_like(ids, -1)  # slot by slot: a table of all pairs would be k times as large
    for slot in reversed(range(among.shape[-1])):
        match = torch.where(ids == among[..., slot : slot + 1], slot, match)
    return match.masked_fill(ids < 0, -1)


# The strategies that need the log-probabilities of the other side's candidates.
_NEEDED_BY = {
    "teacher_on_student_logprobs": ("student", "union", "symmetric_difference"),
    "student_on_teacher_logprobs": ("teacher", "union", "symmetric_difference"),
}


def _check(mask: Any, strategy: Any, reward_weight: Any, weight: Any, **candidates: Any) -> None:
    op = "opd_rewards"
    for name, tensor in {**candidates, "mask": mask, "weight": weight}.items():
        checks.kind(op, name, tensor, "Tensor" if "_topk_" in name else "Tensor?", Tensor, "a tensor")
    checks.kind(op, "strategy", strategy, "str")
    checks.kind(op, "reward_weight", reward_weight, "str")
    ids = candidates["student_topk_ids"]
    if ids.ndim < 1 or ids.shape[-1] < 1:
        checks.bad_value(op, "student_topk_ids", "have shape [..., k] with k >= 1", list(ids.shape))
    for name, tensor in candidates.items():
        allowed = checks.IDS if name.endswith("ids") else checks.FLOATS
        checks.has_one_for_each(op, name, tensor, ids, ids.shape, allowed)
    checks.mask_of_positions(op, mask, ids, ids.shape[:-1])
    checks.one_of(op, "strategy", strategy, get_args(Strategy))
    for name, strategies in _NEEDED_BY.items():
        if strategy in strategies and candidates[name] is None:
            checks.bad_value(op, name, f"be given when strategy is {strategy!r}", None)
    checks.one_of(op, "reward_weight", reward_weight, checks.REWARD_WEIGHTS)
    checks.has_one_for_each(op, "weight", weight, ids, ids.shape[:-1])
    if has_values(ids):
        for side in ("student", "teacher"):
            name = f"{side}_topk_ids"
            checks.distinct(op, name, candidates[name], candidates[f"{side}_topk_logprobs"], mask)

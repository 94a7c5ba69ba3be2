"""`reliability`: the row pass, then at each position overlap, drift, candidates and rewards; then the scan."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .position import run_at_positions
from .scan import scan
from .selection import compare, id_of
from .summary import float64, logprobs_at


@triton.jit
def candidate_rewards(student, teacher, exists, WEIGHT: tl.constexpr, K: tl.constexpr):
    """Return r (eq. 11 without L) from both sides' log-probabilities of the candidates."""
    weight = tl.full(student.shape, 1.0, tl.float64) / K
    if WEIGHT != "none":
        of = tl.where(exists, student if WEIGHT == "student" else teacher, float("-inf"))
        greatest = tl.max(of, 0)
        weight = tl.where(greatest == float("-inf"), 0.0, tl.exp(of - greatest))
        weight = weight / tl.sum(weight, 0)  # 0 / 0: no mass to renormalise
    reward = tl.where(teacher == float("-inf"), float("-inf"), weight * (teacher - student))
    return tl.where((student == teacher) | (student == float("-inf")) | (weight != weight), 0.0, reward)


@triton.jit
def is_rejected(token, candidates, ids, logprobs, exists, top_p):
    """Return whether the token is outside the nucleus (eq. 14-16), by the mass before it."""
    is_token = exists & (ids == token)
    of_token = tl.max(tl.where(is_token, candidates, -(2**63)), 0)
    before = tl.sum(tl.where(exists & (candidates > of_token), tl.exp(logprobs), 0.0), 0)
    return (tl.max(is_token.to(tl.int32), 0) == 0) | (before >= top_p - 1e-6)


@triton.jit
def reliability_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars,
                         K: tl.constexpr, WEIGHT: tl.constexpr):  # fmt: skip
    """Store a position's results. Drift is by acceptance if there are token_ids."""
    token_ids, threshold, top_p = inputs[0], scalars[0], scalars[1]
    overlap, drift, topk_ids, rewards = outputs
    x_side, y_side = sides
    x, y, rank, _, common = compare(candidates, K)
    exists = tl.arange(0, x.shape[0]) < K
    share = tl.where(broken, 0, common).to(tl.float64) / K
    if token_ids is not None:
        y_ids = id_of(y)
        y_logprobs = logprobs_at(y_side, y_ids, exists)
        drifts = is_rejected(tl.load(token_ids + n), y, y_ids, y_logprobs, exists, float64(top_p))
    else:
        drifts = share < float64(threshold)
    ids = id_of(x)
    reward = candidate_rewards(logprobs_at(x_side, ids, exists), logprobs_at(y_side, ids, exists), exists, WEIGHT, K)
    tl.store(overlap + n, share.to(tl.float32))
    tl.store(drift + n, (drifts | broken).to(tl.int8))
    tl.store(topk_ids + n * K + rank, ids.to(tl.int64), mask=exists)
    tl.store(rewards + n * K + rank, tl.where(broken, float("nan"), reward).to(tl.float32), mask=exists)


def reliability(a: Any) -> tuple[Tensor, ...]:
    shape = a.student_logits.shape[:-1]
    new: Any = a.student_logits.new_empty
    overlap, drift = new(shape, dtype=torch.float32), new(shape, dtype=torch.bool)
    topk_ids, rewards = new((*shape, a.k), dtype=torch.int64), new((*shape, a.k), dtype=torch.float32)
    token_ids = a.token_ids if a.metric == "top_p" else None
    outputs = (overlap, drift.view(torch.int8), topk_ids, rewards)
    run_at_positions(reliability_position, a, (token_ids,), outputs, (a.threshold, a.top_p), mask=a.mask, k=a.k,
                     selects=True, option=a.reward_weight)  # fmt: skip
    return overlap, drift, *scan(drift, a, rewards), topk_ids, rewards

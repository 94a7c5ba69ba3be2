"""`reliability`: the row pass, then at each position overlap, drift, candidates and rewards; then the scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import mass_of_nucleus, outputs_of
from .position import run_at_positions
from .scan import scan
from .selection import EMPTY, compare, count, id_of
from .summary import float64, logprobs_at, state_of, store_all, store_divergence


@triton.jit
def candidate_rewards(student, teacher, filled, WEIGHT: tl.constexpr):
    """Return r (eq. 11 without L) from both sides' log-probabilities of the candidates."""
    weight = 1.0 / tl.maximum(count(filled), 1).to(tl.float64) + tl.zeros(student.shape, tl.float64)
    if WEIGHT != "none":
        of = tl.where(filled, student if WEIGHT == "student" else teacher, float("-inf"))
        greatest = tl.max(of, 0)
        weight = tl.where(greatest == float("-inf"), 0.0, tl.exp(of - greatest))
        weight = weight / tl.sum(weight, 0)  # 0 / 0: no mass to renormalise
    reward = tl.where(teacher == float("-inf"), float("-inf"), weight * (teacher - student))
    return tl.where((student == teacher) | (student == float("-inf")) | (weight != weight), 0.0, reward)


@triton.jit
def is_accepted(token, candidates, logprobs, enough):
    """Return whether the token is in the nucleus, by the mass before it; the mass `enough` completes the nucleus."""
    is_token = (candidates > EMPTY) & (id_of(candidates) == token)
    of_token = tl.max(tl.where(is_token, candidates, -(2**63)), 0)
    before = tl.sum(tl.where(candidates > of_token, tl.exp(logprobs), 0.0), 0)
    return (tl.max(is_token.to(tl.int32), 0) > 0) & (before < enough)


@triton.jit
def scores_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars, K: tl.constexpr,
                    OPTION: tl.constexpr):  # fmt: skip
    """Store a position's results. OPTION is the metric, what weighs the rewards, and what else `opd_scores` wants."""
    token_ids, threshold, enough = inputs[0], float64(scalars[0]), float64(scalars[1])
    overlap, drift, topk_ids, rewards = outputs[0], outputs[1], outputs[2] + n * K, outputs[3] + n * K
    if len(outputs) > 4:  # first, so that registers are free for the candidates
        store_divergences(n, sides, divergences, broken, outputs, OPTION[2], OPTION[3])
    x_side, y_side = sides
    x, y, rank, _, share = compare(candidates, K)
    exists = tl.arange(0, x.shape[0]) < K
    share = tl.where(broken, 0.0, share)
    accepted = tl.zeros([], tl.int1)
    if token_ids is not None:
        y_logprobs = logprobs_at(y_side, id_of(y), exists)
        accepted = is_accepted(tl.load(token_ids + n), y, y_logprobs, enough) & (broken == 0)
    drifts = accepted == 0 if OPTION[0] == "top_p" else share < threshold
    ids, filled = id_of(x), x > EMPTY
    reward = candidate_rewards(logprobs_at(x_side, ids, exists), logprobs_at(y_side, ids, exists), filled, OPTION[1])
    x_reference, _, _ = state_of(x_side)
    # Of a broken row of the student, NaN even in empty slots.
    reward = tl.where(broken & filled, float("nan"), reward) + (x_reference - x_reference)
    tl.store(overlap + n, share.to(tl.float32))
    tl.store(drift + n, drifts.to(tl.int8))
    tl.store(topk_ids + rank, ids.to(tl.int64), mask=exists)
    tl.store(rewards + rank, reward, mask=exists)
    if len(outputs) > 4:
        tl.store(outputs[4] + n, accepted.to(tl.int8))


@triton.jit
def store_divergences(n, sides, divergences, broken, outputs, ENTROPIES: tl.constexpr,
                      DIVERGENCE: tl.constexpr):  # fmt: skip
    """Store the entropies, KL and the state."""
    kl = tl.where(broken, float("nan"), divergences[0])
    zero = tl.zeros([], tl.float64)
    for i in tl.static_range(2):
        entropy = sides[i][1][3] if ENTROPIES else zero
        tl.store(outputs[5 + i] + n, entropy.to(tl.float32))
    tl.store(outputs[7] + n, kl if ENTROPIES or DIVERGENCE else zero)
    if DIVERGENCE:
        store_divergence(outputs[8] + 5 * n, sides, kl, divergences[2])
    else:
        reference, mass, _ = state_of(sides[0])
        store_all(outputs[8] + 5 * n, (reference, mass, zero, zero, zero))


def score(
    a: Any,
    token_ids: Tensor | None,
    weight: Tensor | None = None,
    more: Sequence[Tensor] = (),
    entropies: bool = False,
    divergence: bool = False,
) -> tuple[Tensor, ...]:
    """Return what `reliability` returns, with the weight in place of L; fill what `opd_scores` returns besides."""
    overlap, drift = outputs_of(a, torch.float32, torch.bool)
    topk_ids, rewards = outputs_of(a, torch.int64, torch.float64, last=(a.k,))
    outputs = (overlap, drift.view(torch.int8), topk_ids, rewards, *more)
    stats = (2 if entropies or divergence else 0, 1 if entropies else 0)
    scalars, option = (a.threshold, mass_of_nucleus(a.top_p)), (a.metric, a.reward_weight, entropies, divergence)
    run_at_positions(scores_position, a, (token_ids,), outputs, scalars, mask=a.mask, k=a.k, stats=stats, option=option)
    *along, rewards = scan(drift, a, rewards, weight)
    return overlap, drift, *along, topk_ids, rewards


def reliability(a: Any) -> tuple[Tensor, ...]:
    return score(a, a.token_ids if a.metric == "top_p" else None)

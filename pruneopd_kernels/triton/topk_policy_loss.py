"""`topk_policy_loss`: one row's mass, then the terms of its candidates and their derivatives."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .losses import logprobs_of_candidates, state_of, store_coefficients, store_floats, used_positions
from .position import for_any_axes, run_at_positions
from .summary import float64

LARGEST_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def within(x, low, high):
    """Return x clamped; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def policy_terms(logprobs, advantages, old, skipped, clip_low, clip_high, clip_dual):
    """Return each candidate's term of the loss, and its derivative by the log-probability."""
    advantages = tl.where(skipped, 0.0, advantages)
    log_ratio = tl.where(skipped, 0.0, logprobs - old)
    ratio = tl.exp(within(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    unclipped = -advantages * ratio
    clipped = -advantages * within(ratio, 1 - clip_low, 1 + clip_high)
    by_ratio = (unclipped < clipped) == 0  # also NaN and equal terms
    terms = tl.where(by_ratio, unclipped, clipped)
    by_dual = (advantages < 0) & (terms > -advantages * clip_dual)
    terms = tl.where(by_dual, -advantages * clip_dual, terms)
    moves = by_ratio & (by_dual == 0) & ((tl.abs(log_ratio) > LARGEST_LOG_RATIO) == 0) & (skipped == 0)
    return tl.where(skipped, 0.0, terms), tl.where(moves, unclipped, 0.0)


@triton.jit
def policy_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars,
                    M: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    topk_ids, advantages, old_logprobs = inputs
    loss, coefficients, state = outputs
    clip_low, clip_high, clip_dual = float64(scalars[0]), float64(scalars[1]), float64(scalars[2])
    j = tl.arange(0, triton.next_power_of_2(M))
    exists = j < M
    at = n * M + j
    ids = tl.load(topk_ids + at, mask=exists, other=-1).to(tl.int64)
    advantage = tl.load(advantages + at, mask=exists, other=0.0).to(tl.float64)
    logprobs = logprobs_of_candidates(sides[0], ids, vocab_size)
    old = logprobs
    if old_logprobs is not None:
        old = tl.load(old_logprobs + at, mask=exists, other=0.0).to(tl.float64)
    skipped = (ids < 0) | (advantage == 0) | (logprobs == float("-inf"))
    terms, derivatives = policy_terms(logprobs, advantage, old, skipped, clip_low, clip_high, clip_dual)
    total = tl.sum(terms, 0)
    store_floats((loss,), n, (total,))
    store_coefficients(coefficients, at, derivatives, exists, total)
    store_floats((state, state + 1), 2 * n, state_of(sides[0]))


@for_any_axes
def topk_policy_loss(a: Any) -> tuple[Tensor, ...]:
    *shape, m = a.topk_ids.shape
    new: Any = a.student_logits.new_empty
    outputs = [new((*shape, *more), dtype=torch.float32) for more in ((), (m,), (2,))]
    used = used_positions(a.mask, ((a.topk_ids >= 0) & (a.advantages != 0)).any(-1))
    inputs, scalars = (a.topk_ids, a.advantages, a.old_logprobs), (a.clip_low, a.clip_high, a.clip_dual)
    run_at_positions(policy_position, a, inputs, outputs, scalars, mask=used, k=m)
    return tuple(outputs)

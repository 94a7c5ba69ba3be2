"""`topk_policy_loss`: one row's mass, then the terms of its candidates and their derivatives."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import float64_bits, per_position
from .losses import logprobs_at, state_of, store_coefficients, store_floats, store_zeros, used_positions
from .position import DO_NOT_SPECIALIZE, Launch, end_of_span, for_any_axes, is_due, memory_of, row_at, span_of
from .row_pass import sum_segment
from .summary import exact_summary, float64, summarize_one

LARGEST_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def within(x, low, high):
    """Clamped; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def policy_terms(logprobs, advantages, old, skipped, clip_low, clip_high, clip_dual):
    """Each candidate's term of the loss, and its derivative by the candidate's log-probability."""
    advantages = tl.where(skipped, 0.0, advantages)
    log_ratio = tl.where(skipped, 0.0, logprobs - old)
    ratio = tl.exp(within(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))
    unclipped = -advantages * ratio
    clipped = -advantages * within(ratio, 1 - clip_low, 1 + clip_high)
    by_ratio = (unclipped < clipped) == 0  # NaN too, and of what is equal the unclipped one
    terms = tl.where(by_ratio, unclipped, clipped)
    by_dual = (advantages < 0) & (terms > -advantages * clip_dual)
    terms = tl.where(by_dual, -advantages * clip_dual, terms)
    moves = by_ratio & (by_dual == 0) & ((tl.abs(log_ratio) > LARGEST_LOG_RATIO) == 0) & (skipped == 0)
    return tl.where(skipped, 0.0, terms), tl.where(moves, unclipped, 0.0)


@triton.jit(do_not_specialize=[*DO_NOT_SPECIALIZE, "clip_low", "clip_high", "clip_dual"])
def policy_kernel(logits, used, topk_ids, advantages, old_logprobs, scratch, needs_exact, loss, coefficients, state,
                  positions, words, inner, outer_stride, inner_stride, vocab_size, segments, scale, temperature,
                  clip_low, clip_high, clip_dual, M: tl.constexpr, M_PADDED: tl.constexpr, PASS: tl.constexpr,
                  VEC: tl.constexpr, ALIGNED: tl.constexpr, LISTS: tl.constexpr, SEGMENTS: tl.constexpr,
                  K_PADDED: tl.constexpr):  # fmt: skip
    scale, temperature = float64(scale).to(tl.float32), float64(temperature)
    clip_low, clip_high, clip_dual = float64(clip_low), float64(clip_high), float64(clip_dual)
    _, _, _, records, _ = memory_of(scratch, tl.program_id(0), words, logits, None, LISTS, SEGMENTS, K_PADDED)
    SPAN: tl.constexpr = span_of(PASS)
    j = tl.arange(0, M_PADDED)
    exists = j < M
    for first in range(tl.program_id(0) * SPAN, positions, tl.num_programs(0) * SPAN):
        for position in range(first, end_of_span(needs_exact, first, positions, SPAN)):
            n = position + tl.zeros([], tl.int64)
            at = n * M + j
            if is_due(used, needs_exact, n, PASS):
                row = row_at(logits, n, inner, outer_stride, inner_stride, VEC, ALIGNED)
                if PASS == "exact":
                    row_sum, broken = exact_summary(row, None, 0, vocab_size, temperature)
                else:
                    if PASS == "fused":
                        for segment in range(segments):
                            sum_segment(row, None, None, records, segment, vocab_size, scale, scale,
                                        SEGMENTS, VEC, 0)  # fmt: skip
                        tl.debug_barrier()
                    row_sum, broken = summarize_one(records, segments, scale, temperature, SEGMENTS)
                    tl.store(needs_exact + n, broken.to(tl.int8))  # then the exact pass overwrites the results
                ids = tl.load(topk_ids + at, mask=exists, other=-1).to(tl.int64)
                advantage = tl.load(advantages + at, mask=exists, other=0.0).to(tl.float64)
                logprobs = logprobs_at(row, ids, vocab_size, row_sum, temperature)
                old = logprobs
                if old_logprobs is not None:
                    old = tl.load(old_logprobs + at, mask=exists, other=0.0).to(tl.float64)
                skipped = (ids < 0) | (advantage == 0) | (logprobs == float("-inf"))
                terms, derivatives = policy_terms(logprobs, advantage, old, skipped, clip_low, clip_high, clip_dual)
                total = tl.sum(terms, 0)
                store_floats((loss,), n, (total,))
                store_coefficients(coefficients, at, derivatives, exists, total)
                store_floats((state, state + 1), 2 * n, state_of(row_sum))
                tl.debug_barrier()  # the memory is free for the next position
            elif PASS != "exact":
                tl.store(needs_exact + n, 0)
                store_zeros((loss,), n, None)
                store_zeros((coefficients,), at, exists)
                store_zeros((state, state + 1), 2 * n, None)


@for_any_axes
def topk_policy_loss(a: Any) -> tuple[Tensor, ...]:
    *shape, m = a.topk_ids.shape
    new: Any = a.student_logits.new_empty
    outputs = [new((*shape, *more), dtype=torch.float32) for more in ((), (m,), (2,))]
    used = used_positions(a.mask, ((a.topk_ids >= 0) & (a.advantages != 0)).any(-1))
    Launch((a.student_logits,), (a.student_temperature,), used, None, a.vocab_size).run(
        policy_kernel,
        [per_position(a.topk_ids), per_position(a.advantages), per_position(a.old_logprobs)],
        outputs,
        scalars=[float64_bits(a.clip_low), float64_bits(a.clip_high), float64_bits(a.clip_dual)],
        M=m,
        M_PADDED=triton.next_power_of_2(m),
    )
    return tuple(outputs)

"""`reliability`: the row pass, then at each position overlap, drift, candidates and rewards; then the scan."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import float64_bits, per_position
from .position import DO_NOT_SPECIALIZE, Launch, end_of_span, is_due, memory_of, row_at, span_of
from .row_pass import sum_segment
from .scan import scan
from .selection import compare, id_of, select
from .summary import float64, logprob, summarize, summarize_exactly


@triton.jit
def candidate_rewards(student, teacher, exists, WEIGHT: tl.constexpr, K: tl.constexpr):
    """r (eq. 11 without L) from both sides' log-probabilities of the candidates."""
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
    """Whether the token is outside of the nucleus (eq. 14-16): the mass that precedes it decides."""
    is_token = exists & (ids == token)
    of_token = tl.max(tl.where(is_token, candidates, -(2**63)), 0)
    before = tl.sum(tl.where(exists & (candidates > of_token), tl.exp(logprobs), 0.0), 0)
    return (tl.max(is_token.to(tl.int32), 0) == 0) | (before >= top_p - 1e-6)


@triton.jit(do_not_specialize=[*DO_NOT_SPECIALIZE, "threshold", "top_p"])
def reliability_kernel(x_logits, y_logits, mask, token_ids, scratch, needs_exact, overlap, drift, topk_ids, rewards,
                       positions, words, x_inner, x_outer_stride, x_inner_stride, y_inner, y_outer_stride,
                       y_inner_stride, vocab_size, segments, x_scale, y_scale, x_temperature,
                       y_temperature, threshold, top_p, WEIGHT: tl.constexpr, K: tl.constexpr, PASS: tl.constexpr,
                       VEC: tl.constexpr, ALIGNED: tl.constexpr, LISTS: tl.constexpr, SEGMENTS: tl.constexpr,
                       K_PADDED: tl.constexpr, TILES_PADDED: tl.constexpr, X_SHIFT: tl.constexpr,
                       Y_SHIFT: tl.constexpr):  # fmt: skip
    """x is the student, y the teacher. Drift is by acceptance where there are token_ids."""
    x_scale, y_scale = float64(x_scale).to(tl.float32), float64(y_scale).to(tl.float32)
    x_temperature, y_temperature = float64(x_temperature), float64(y_temperature)
    x_best, y_best, lists, records, maxima = memory_of(
        scratch, tl.program_id(0), words, x_logits, y_logits, LISTS, SEGMENTS, K_PADDED
    )
    SPAN: tl.constexpr = span_of(PASS)
    j = tl.arange(0, K_PADDED)
    exists = j < K
    for first in range(tl.program_id(0) * SPAN, positions, tl.num_programs(0) * SPAN):
        for position in range(first, end_of_span(needs_exact, first, positions, SPAN)):
            n = position + tl.zeros([], tl.int64)
            at = n * K
            if is_due(mask, needs_exact, n, PASS):
                x_row = row_at(x_logits, n, x_inner, x_outer_stride, x_inner_stride, VEC, ALIGNED)
                y_row = row_at(y_logits, n, y_inner, y_outer_stride, y_inner_stride, VEC, ALIGNED)
                if PASS == "exact":
                    x_sum, y_sum, _, _, _, broken = summarize_exactly(
                        x_row, y_row, maxima, vocab_size, x_temperature, y_temperature, 0
                    )
                else:
                    if PASS == "fused":
                        for segment in range(segments):
                            sum_segment(x_row, y_row, maxima, records, segment, vocab_size, x_scale, y_scale,
                                        SEGMENTS, VEC, 0)  # fmt: skip
                        tl.debug_barrier()
                    x_sum, y_sum, _, _, _, broken = summarize(
                        records, segments, x_scale, y_scale, x_temperature, y_temperature, SEGMENTS, 0
                    )
                    tl.store(needs_exact + n, broken.to(tl.int8))  # then the exact pass overwrites the results
                select(x_row, maxima, vocab_size, lists, x_best, K, K_PADDED, TILES_PADDED, X_SHIFT)
                select(y_row, maxima + 1, vocab_size, lists, y_best, K, K_PADDED, TILES_PADDED, Y_SHIFT)
                x, y, x_rank, _, common = compare(x_best, y_best, K, K_PADDED)
                share = tl.where(broken, 0, common).to(tl.float64) / K
                if token_ids is not None:
                    y_ids = id_of(y)
                    y_logprobs = logprob(tl.load(y_row + y_ids, mask=exists, other=0.0), y_sum, y_temperature)
                    drifts = is_rejected(tl.load(token_ids + n), y, y_ids, y_logprobs, exists, float64(top_p))
                else:
                    drifts = share < float64(threshold)
                x_ids = id_of(x)
                student = logprob(tl.load(x_row + x_ids, mask=exists, other=0.0), x_sum, x_temperature)
                teacher = logprob(tl.load(y_row + x_ids, mask=exists, other=0.0), y_sum, y_temperature)
                reward = candidate_rewards(student, teacher, exists, WEIGHT, K)
                tl.store(overlap + n, share.to(tl.float32))
                tl.store(drift + n, (drifts | broken).to(tl.int8))
                tl.store(topk_ids + at + x_rank, x_ids.to(tl.int64), mask=exists)
                tl.store(rewards + at + x_rank, tl.where(broken, float("nan"), reward).to(tl.float32), mask=exists)
                tl.debug_barrier()  # the memory is free for the next position
            elif PASS != "exact":
                tl.store(needs_exact + n, 0)
                tl.store(overlap + n, 0.0)
                tl.store(drift + n, 0)
                tl.store(topk_ids + at + j, j.to(tl.int64), mask=exists)
                tl.store(rewards + at + j, tl.zeros([K_PADDED], tl.float32), mask=exists)


def reliability(a: Any) -> tuple[Tensor, ...]:
    shape = a.student_logits.shape[:-1]
    new: Any = a.student_logits.new_empty
    overlap, drift = new(shape, dtype=torch.float32), new(shape, dtype=torch.bool)
    topk_ids, rewards = new((*shape, a.k), dtype=torch.int64), new((*shape, a.k), dtype=torch.float32)
    logits, temperatures = (a.student_logits, a.teacher_logits), (a.student_temperature, a.teacher_temperature)
    Launch(logits, temperatures, a.mask, a.k, a.vocab_size).run(
        reliability_kernel,
        [per_position(a.token_ids) if a.metric == "top_p" else None],
        outputs=[overlap, drift.view(torch.int8), topk_ids, rewards],
        scalars=[float64_bits(a.threshold), float64_bits(a.top_p)],
        WEIGHT=a.reward_weight,
    )
    along = scan(drift, a.mask, a.cu_seqlens, a.drift_count, a.w_drop, a.w_base, a.eps, rewards)
    return overlap, drift, *along, topk_ids, rewards

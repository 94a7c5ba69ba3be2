"""`topk_forward_kl`: one row's mass and candidates, then the terms of the teacher's candidates and what is shared."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import float64_bits, per_position
from .losses import logprobs_at, state_of, store_coefficients, store_floats, store_zeros
from .position import DO_NOT_SPECIALIZE, Launch, end_of_span, for_any_axes, is_due, memory_of, row_at, span_of
from .row_pass import sum_segment
from .selection import id_of, select
from .summary import exact_summary, float64, summarize_one


@triton.jit
def agree(candidates, teacher_topk_ids, teacher_ids, K: tl.constexpr, K_PADDED: tl.constexpr):
    """The student's ids, their ranks, how many are among the teacher's, and which of the teacher's are among them."""
    j = tl.arange(0, K_PADDED)
    student = tl.load(candidates + j, mask=j < K, other=-(2**63))
    student_ids = id_of(student).to(tl.int64)
    rank = tl.zeros([K_PADDED], tl.int32)
    common, shared = tl.zeros([K_PADDED], tl.int1), tl.zeros([K_PADDED], tl.int1)
    for i in range(K):
        other = tl.load(candidates + i)
        rank += (other > student).to(tl.int32)
        shared |= teacher_ids == id_of(other)
        common |= student_ids == tl.load(teacher_topk_ids + i).to(tl.int64)
    return student_ids, rank, tl.sum((common & (j < K)).to(tl.int32), 0), shared


@triton.jit
def forward_terms(student, teacher, is_padding, logprob_min):
    """Each candidate's q (log q - log p), and its derivative by log p; of padding 0."""
    may_move = is_padding == 0
    if logprob_min is not None:
        least = float64(logprob_min)
        may_move &= (student < least) == 0  # NaN too
        student, teacher = tl.where(student < least, least, student), tl.where(teacher < least, least, teacher)
    q = tl.exp(teacher)
    has_mass = (teacher != float("-inf")) & (is_padding == 0)
    is_impossible = (student == float("-inf")) & (teacher == teacher)
    terms = tl.where(is_impossible, float("inf"), q * (teacher - student))
    return tl.where(has_mass, terms, 0.0), tl.where(may_move & has_mass, -q, 0.0)


@triton.jit(do_not_specialize=[*DO_NOT_SPECIALIZE, "logprob_min"])
def forward_kernel(logits, mask, teacher_topk_ids, teacher_topk_logprobs, scratch, needs_exact, loss, student_mass,
                   teacher_mass, overlap, advantage, topk_ids, coefficients, state, positions, words, inner,
                   outer_stride, inner_stride, vocab_size, segments, scale, temperature, logprob_min,
                   K: tl.constexpr, PASS: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
                   LISTS: tl.constexpr, SEGMENTS: tl.constexpr, K_PADDED: tl.constexpr, TILES_PADDED: tl.constexpr,
                   SHIFT: tl.constexpr):  # fmt: skip
    scale, temperature = float64(scale).to(tl.float32), float64(temperature)
    candidates, _, lists, records, maxima = memory_of(
        scratch, tl.program_id(0), words, logits, None, LISTS, SEGMENTS, K_PADDED
    )
    SPAN: tl.constexpr = span_of(PASS)
    j = tl.arange(0, K_PADDED)
    exists = j < K
    for first in range(tl.program_id(0) * SPAN, positions, tl.num_programs(0) * SPAN):
        for position in range(first, end_of_span(needs_exact, first, positions, SPAN)):
            n = position + tl.zeros([], tl.int64)
            at = n * K
            if is_due(mask, needs_exact, n, PASS):
                row = row_at(logits, n, inner, outer_stride, inner_stride, VEC, ALIGNED)
                if PASS == "exact":
                    row_sum, broken = exact_summary(row, maxima, 0, vocab_size, temperature)
                else:
                    if PASS == "fused":
                        for segment in range(segments):
                            sum_segment(row, None, maxima, records, segment, vocab_size, scale, scale,
                                        SEGMENTS, VEC, 0)  # fmt: skip
                        tl.debug_barrier()
                    row_sum, broken = summarize_one(records, segments, scale, temperature, SEGMENTS)
                    tl.store(needs_exact + n, broken.to(tl.int8))  # then the exact pass overwrites the results
                select(row, maxima, vocab_size, lists, candidates, K, K_PADDED, TILES_PADDED, SHIFT)
                ids = tl.load(teacher_topk_ids + at + j, mask=exists, other=-1).to(tl.int64)
                student_ids, rank, common, shared = agree(candidates, teacher_topk_ids + at, ids, K, K_PADDED)
                tl.store(topk_ids + at + rank, student_ids, mask=exists)

                is_padding = ids < 0
                student = logprobs_at(row, ids, vocab_size, row_sum, temperature)
                teacher = tl.load(teacher_topk_logprobs + at + j, mask=exists, other=0.0).to(tl.float64)
                teacher = tl.where(is_padding, float("-inf"), teacher)
                terms, derivatives = forward_terms(student, teacher, is_padding, logprob_min)
                shares = tl.maximum(tl.sum(shared.to(tl.int32), 0), 1).to(tl.float64)
                gain = tl.sum(tl.where(shared, -terms, 0.0), 0) / shares
                mass = tl.sum(tl.exp(student), 0)
                total = tl.sum(terms, 0)
                nan = tl.full([], float("nan"), tl.float64)
                if broken:
                    total, mass, gain, common = nan, nan, nan, common * 0
                share = common.to(tl.float64) / K
                measures = (total, mass, tl.sum(tl.exp(teacher), 0), share, gain)
                store_floats((loss, student_mass, teacher_mass, overlap, advantage), n, measures)
                store_coefficients(coefficients, at + j, derivatives, exists, total)
                store_floats((state, state + 1), 2 * n, state_of(row_sum))
                tl.debug_barrier()  # the memory is free for the next position
            elif PASS != "exact":
                tl.store(needs_exact + n, 0)
                store_zeros((loss, student_mass, teacher_mass, overlap, advantage), n, None)
                store_zeros((coefficients,), at + j, exists)
                store_zeros((state, state + 1), 2 * n, None)
                tl.store(topk_ids + at + j, j.to(tl.int64), mask=exists)


@for_any_axes
def topk_forward_kl(a: Any) -> tuple[Tensor, ...]:
    *shape, k = a.teacher_topk_ids.shape
    new: Any = a.student_logits.new_empty
    outputs = [new(shape, dtype=torch.float32) for _ in range(5)]
    outputs += [new((*shape, k), dtype=torch.int64), new((*shape, k), dtype=torch.float32)]
    outputs += [new((*shape, 2), dtype=torch.float32)]
    Launch((a.student_logits,), (a.student_temperature,), a.mask, k, a.vocab_size).run(
        forward_kernel,
        [per_position(a.teacher_topk_ids), per_position(a.teacher_topk_logprobs)],
        outputs,
        scalars=[None if a.logprob_min is None else float64_bits(a.logprob_min)],
    )
    return tuple(outputs)

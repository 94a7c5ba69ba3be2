"""`token_stats`: the row pass with entropies and divergences, then at each position candidates and statistics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import per_position
from .position import DO_NOT_SPECIALIZE, Launch, end_of_span, for_any_axes, is_due, memory_of, row_at, span_of
from .row_pass import sum_segment
from .selection import compare, id_of, select
from .summary import float64, logprob, summarize, summarize_exactly


@triton.jit
def store_candidates(candidates, rank, own_row, own, own_temperature, other_row, other, other_temperature, ids_out,
                     own_out, other_out, at, K: tl.constexpr, K_PADDED: tl.constexpr):  # fmt: skip
    """One side's candidates in order: ids, log-probabilities in their own row and in the other's."""
    exists = tl.arange(0, K_PADDED) < K
    ids = id_of(candidates)
    at += rank
    own_logprobs = logprob(tl.load(own_row + ids, mask=exists, other=0.0), own, own_temperature)
    other_logprobs = logprob(tl.load(other_row + ids, mask=exists, other=0.0), other, other_temperature)
    tl.store(ids_out + at, ids.to(tl.int64), mask=exists)
    tl.store(own_out + at, own_logprobs.to(tl.float32), mask=exists)
    tl.store(other_out + at, other_logprobs.to(tl.float32), mask=exists)


@triton.jit
def store_row(summary, token, row, temperature, vocab_size, n, lse_out, entropy_out, token_logprob_out):
    """One side's statistics that are not of candidates."""
    _, _, lse, entropy = summary
    tl.store(lse_out + n, lse.to(tl.float32))
    tl.store(entropy_out + n, entropy.to(tl.float32))
    exists = (token >= 0) & (token < vocab_size)
    at_token = logprob(tl.load(row + token, mask=exists, other=0.0), summary, temperature)
    tl.store(token_logprob_out + n, tl.where(exists, at_token, float("nan")).to(tl.float32))


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def token_stats_kernel(x_logits, y_logits, mask, token_ids, scratch, needs_exact, x_topk_ids, x_topk_logprobs,
                       y_topk_ids, y_topk_logprobs, y_on_x_logprobs, x_on_y_logprobs, overlap, x_lse, y_lse, x_entropy,
                       y_entropy, reverse_kl, forward_kl, x_token_logprob, y_token_logprob, positions, words, x_inner,
                       x_outer_stride, x_inner_stride, y_inner, y_outer_stride, y_inner_stride, vocab_size, segments,
                       x_scale, y_scale, x_temperature, y_temperature, K: tl.constexpr,
                       PASS: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr, LISTS: tl.constexpr,
                       SEGMENTS: tl.constexpr, K_PADDED: tl.constexpr, TILES_PADDED: tl.constexpr,
                       X_SHIFT: tl.constexpr, Y_SHIFT: tl.constexpr):  # fmt: skip
    """x is the student, y the teacher."""
    x_scale, y_scale = float64(x_scale).to(tl.float32), float64(y_scale).to(tl.float32)
    x_temperature, y_temperature = float64(x_temperature), float64(y_temperature)
    x_best, y_best, lists, records, maxima = memory_of(
        scratch, tl.program_id(0), words, x_logits, y_logits, LISTS, SEGMENTS, K_PADDED
    )
    SPAN: tl.constexpr = span_of(PASS)
    for first in range(tl.program_id(0) * SPAN, positions, tl.num_programs(0) * SPAN):
        for position in range(first, end_of_span(needs_exact, first, positions, SPAN)):
            n = position + tl.zeros([], tl.int64)
            at = n * K
            if is_due(mask, needs_exact, n, PASS):
                x_row = row_at(x_logits, n, x_inner, x_outer_stride, x_inner_stride, VEC, ALIGNED)
                y_row = row_at(y_logits, n, y_inner, y_outer_stride, y_inner_stride, VEC, ALIGNED)
                if PASS == "exact":
                    x_sum, y_sum, x_kl, y_kl, _, broken = summarize_exactly(
                        x_row, y_row, maxima, vocab_size, x_temperature, y_temperature, 2
                    )
                else:
                    if PASS == "fused":
                        for segment in range(segments):
                            sum_segment(x_row, y_row, maxima, records, segment, vocab_size, x_scale, y_scale,
                                        SEGMENTS, VEC, 2)  # fmt: skip
                        tl.debug_barrier()
                    x_sum, y_sum, x_kl, y_kl, _, broken = summarize(
                        records, segments, x_scale, y_scale, x_temperature, y_temperature, SEGMENTS, 2
                    )
                    tl.store(needs_exact + n, broken.to(tl.int8))  # then the exact pass overwrites the results
                tl.store(reverse_kl + n, x_kl.to(tl.float32))
                tl.store(forward_kl + n, y_kl.to(tl.float32))
                token = tl.full([], -1, tl.int64)
                if token_ids is not None:
                    token = tl.load(token_ids + n).to(tl.int64)
                store_row(x_sum, token, x_row, x_temperature, vocab_size, n, x_lse, x_entropy, x_token_logprob)
                store_row(y_sum, token, y_row, y_temperature, vocab_size, n, y_lse, y_entropy, y_token_logprob)

                select(x_row, maxima, vocab_size, lists, x_best, K, K_PADDED, TILES_PADDED, X_SHIFT)
                select(y_row, maxima + 1, vocab_size, lists, y_best, K, K_PADDED, TILES_PADDED, Y_SHIFT)
                x, y, x_rank, y_rank, common = compare(x_best, y_best, K, K_PADDED)
                tl.store(overlap + n, (tl.where(broken, 0, common).to(tl.float64) / K).to(tl.float32))
                store_candidates(x, x_rank, x_row, x_sum, x_temperature, y_row, y_sum, y_temperature, x_topk_ids,
                                 x_topk_logprobs, y_on_x_logprobs, at, K, K_PADDED)  # fmt: skip
                store_candidates(y, y_rank, y_row, y_sum, y_temperature, x_row, x_sum, x_temperature, y_topk_ids,
                                 y_topk_logprobs, x_on_y_logprobs, at, K, K_PADDED)  # fmt: skip
                tl.debug_barrier()  # the memory is free for the next position
            elif PASS != "exact":
                tl.store(needs_exact + n, 0)
                store_masked((x_topk_ids, y_topk_ids), at, K, K_PADDED)
                store_masked((x_topk_logprobs, y_topk_logprobs, y_on_x_logprobs, x_on_y_logprobs), at, K, K_PADDED)
                store_masked((overlap, x_lse, y_lse, x_entropy, y_entropy), n, 1, 1)
                store_masked((reverse_kl, forward_kl, x_token_logprob, y_token_logprob), n, 1, 1)


@triton.jit
def store_masked(outputs, at, K: tl.constexpr, K_PADDED: tl.constexpr):
    """0 .. k-1 as ids, 0 as everything else."""
    j = tl.arange(0, K_PADDED)
    for i in tl.static_range(len(outputs)):
        value = j if outputs[i].dtype.element_ty == tl.int64 else tl.zeros([K_PADDED], tl.float32)
        tl.store(outputs[i] + at + j, value, mask=j < K)


@for_any_axes
def token_stats(a: Any) -> tuple[Tensor, ...]:
    shape = a.student_logits.shape[:-1]
    new: Any = a.student_logits.new_empty
    candidates = [torch.int64, torch.float32, torch.int64, *[torch.float32] * 3]
    outputs = [new((*shape, a.k), dtype=dtype) for dtype in candidates]
    outputs += [new(shape, dtype=torch.float32) for _ in range(9)]
    logits, temperatures = (a.student_logits, a.teacher_logits), (a.student_temperature, a.teacher_temperature)
    launch = Launch(logits, temperatures, a.mask, a.k, a.vocab_size, stats=2)
    launch.run(token_stats_kernel, [per_position(a.token_ids)], outputs, scalars=[])
    return tuple(outputs)

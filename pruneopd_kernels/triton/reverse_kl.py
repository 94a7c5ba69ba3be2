"""`reverse_kl`: the row pass with the student's divergence; and its backward pass, through both rows again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gradient
from .arguments import per_position
from .gradient import (
    as_computed,
    divided,
    end_of_whole_blocks,
    exponential,
    gradient_row,
    load_block,
    part_of,
    store_block,
    store_nothing,
)
from .losses import is_finite, state_of, store_floats, store_zeros, used_positions
from .position import DO_NOT_SPECIALIZE, Launch, end_of_span, for_any_axes, is_due, memory_of, row_at, span_of
from .row_pass import BLOCK, sum_segment
from .summary import float64, summarize, summarize_exactly


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def reverse_kl_kernel(x_logits, y_logits, used, weight, scratch, needs_exact, loss, state, positions, words, x_inner,
                      x_outer_stride, x_inner_stride, y_inner, y_outer_stride, y_inner_stride, vocab_size, segments,
                      x_scale, y_scale, x_temperature, y_temperature, PASS: tl.constexpr, VEC: tl.constexpr,
                      ALIGNED: tl.constexpr, LISTS: tl.constexpr, SEGMENTS: tl.constexpr,
                      K_PADDED: tl.constexpr):  # fmt: skip
    """x is the student, y the teacher."""
    x_scale, y_scale = float64(x_scale).to(tl.float32), float64(y_scale).to(tl.float32)
    x_temperature, y_temperature = float64(x_temperature), float64(y_temperature)
    _, _, _, records, _ = memory_of(scratch, tl.program_id(0), words, x_logits, y_logits, LISTS, SEGMENTS, K_PADDED)
    states = (state, state + 1, state + 2, state + 3, state + 4)
    SPAN: tl.constexpr = span_of(PASS)
    for first in range(tl.program_id(0) * SPAN, positions, tl.num_programs(0) * SPAN):
        for position in range(first, end_of_span(needs_exact, first, positions, SPAN)):
            n = position + tl.zeros([], tl.int64)
            if is_due(used, needs_exact, n, PASS):
                x_row = row_at(x_logits, n, x_inner, x_outer_stride, x_inner_stride, VEC, ALIGNED)
                y_row = row_at(y_logits, n, y_inner, y_outer_stride, y_inner_stride, VEC, ALIGNED)
                if PASS == "exact":
                    x, y, kl, _unused, excess, broken = summarize_exactly(
                        x_row, y_row, None, vocab_size, x_temperature, y_temperature, 1
                    )
                else:
                    if PASS == "fused":
                        for segment in range(segments):
                            sum_segment(x_row, y_row, None, records, segment, vocab_size, x_scale, y_scale,
                                        SEGMENTS, VEC, 1)  # fmt: skip
                        tl.debug_barrier()
                    x, y, kl, _unused, excess, broken = summarize(
                        records, segments, x_scale, y_scale, x_temperature, y_temperature, SEGMENTS, 1
                    )
                    tl.store(needs_exact + n, broken.to(tl.int8))  # then the exact pass overwrites the results
                nan = tl.full([], float("nan"), tl.float64)
                kl = tl.where(broken, nan, kl)
                total = kl
                if weight is not None:
                    total *= tl.load(weight + n).to(tl.float64)
                store_floats((loss,), n, (total,))
                reference, mass = state_of(x)
                teacher_reference, teacher_mass = state_of(y)
                offset = tl.where(is_finite(total), kl + tl.log(mass) - tl.log(teacher_mass), nan)
                store_floats(states, 5 * n, (reference, mass, teacher_reference, offset, excess))
                tl.debug_barrier()  # the memory is free for the next position
            elif PASS != "exact":
                tl.store(needs_exact + n, 0)
                store_zeros((loss,), n, None)
                store_zeros(states, 5 * n, None)


@for_any_axes
def reverse_kl(a: Any) -> tuple[Tensor, ...]:
    shape = a.student_logits.shape[:-1]
    new: Any = a.student_logits.new_empty
    outputs = [new(shape, dtype=torch.float32), new((*shape, 5), dtype=torch.float32)]
    used = a.mask if a.weight is None else used_positions(a.mask, a.weight != 0)
    logits, temperatures = (a.student_logits, a.teacher_logits), (a.student_temperature, a.teacher_temperature)
    Launch(logits, temperatures, used, None, a.vocab_size, stats=1).run(
        reverse_kl_kernel, [per_position(a.weight)], outputs, scalars=[]
    )
    return tuple(outputs)


@triton.jit
def write_block(x_row, y_row, out, first, vocab_size, end, x_reference, y_reference, offset, peak, of_peak,
                from_p, x_temperature, y_temperature, VEC: tl.constexpr, EXACT: tl.constexpr,
                MASKED: tl.constexpr):  # fmt: skip
    """p (log p - log q - KL), 0 where p is 0; NaN everywhere where the offset is NaN."""
    logits = load_block(x_row, first, vocab_size, VEC, EXACT, MASKED)
    x, y = logits - x_reference, load_block(y_row, first, vocab_size, VEC, EXACT, MASKED) - y_reference
    p = from_p * exponential(x, x_temperature, EXACT)
    excess = divided(x, x_temperature, EXACT) - divided(y, y_temperature, EXACT) - offset
    excess = tl.where(logits == peak, of_peak, excess)
    values = tl.where(p == 0, tl.where(offset == offset, 0.0, offset), p * excess)
    store_block(out, first, values, vocab_size, end, VEC, MASKED)


@triton.jit(do_not_specialize=["parts", "at_a_time", "x_temperature", "y_temperature"])
def reverse_kl_backward_kernel(x_logits, y_logits, state, scale, student_logits_gradient, x_inner, x_outer_stride,
                               x_inner_stride, y_inner, y_outer_stride, y_inner_stride, width, vocab_size, parts,
                               at_a_time, x_temperature, y_temperature, VEC: tl.constexpr, ALIGNED: tl.constexpr,
                               EXACT: tl.constexpr):  # fmt: skip
    """x is the student, y the teacher."""
    x_temperature, y_temperature = float64(x_temperature), float64(y_temperature)
    n = (tl.program_id(0) // parts).to(tl.int64)
    begin, end = part_of(tl.program_id(0) % parts, at_a_time, width)
    out = gradient_row(student_logits_gradient, n, width, VEC, ALIGNED)
    factor = tl.load(scale + n).to(tl.float64)
    if factor != 0:
        x_row = row_at(x_logits, n, x_inner, x_outer_stride, x_inner_stride, VEC, ALIGNED)
        y_row = row_at(y_logits, n, y_inner, y_outer_stride, y_inner_stride, VEC, ALIGNED)
        x_reference, mass = as_computed(tl.load(state + 5 * n), EXACT), tl.load(state + 5 * n + 1).to(tl.float64)
        y_reference = as_computed(tl.load(state + 5 * n + 2), EXACT)
        offset = as_computed(tl.load(state + 5 * n + 3), EXACT)
        offset = tl.where(tl.abs(offset) < float("inf"), offset, float("nan"))
        # Of a logit that has most of the mass float32 could not tell the excess: the forward pass could.
        is_peaked = (mass < 1.5) & (offset == offset)
        peak, of_peak = tl.where(is_peaked, x_reference, float("nan")), as_computed(tl.load(state + 5 * n + 4), EXACT)
        from_p = as_computed(factor / x_temperature / mass, EXACT)
        whole = end_of_whole_blocks(begin, end, vocab_size)
        for first in range(begin, whole, BLOCK):
            write_block(x_row, y_row, out, first, vocab_size, end, x_reference, y_reference, offset, peak,
                        of_peak, from_p, x_temperature, y_temperature, VEC, EXACT, False)  # fmt: skip
        for first in range(whole, end, BLOCK):
            write_block(x_row, y_row, out, first, vocab_size, end, x_reference, y_reference, offset, peak,
                        of_peak, from_p, x_temperature, y_temperature, VEC, EXACT, True)  # fmt: skip
    else:
        store_nothing(out, begin, end, VEC)


@for_any_axes
def reverse_kl_backward(a: Any) -> tuple[Tensor, ...]:
    logits, temperatures = (a.student_logits, a.teacher_logits), (a.student_temperature, a.teacher_temperature)
    return (gradient.run(reverse_kl_backward_kernel, logits, temperatures, a.vocab_size, (a.state, a.scale)),)

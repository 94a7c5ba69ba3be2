"""`logprobs_backward`: from the derivatives by the log-probabilities of candidates to the gradient of the logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import gradient
from .gradient import (
    as_computed,
    end_of_whole_blocks,
    exponential,
    gradient_row,
    load_block,
    part_of,
    store_block,
    store_nothing,
)
from .position import for_any_axes, row_at
from .row_pass import BLOCK
from .summary import float64


@triton.jit
def write_block(row, out, first, vocab_size, end, reference, from_p, temperature, VEC: tl.constexpr,
                EXACT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    x = load_block(row, first, vocab_size, VEC, EXACT, MASKED)
    values = from_p * exponential(x - reference, temperature, EXACT)
    store_block(out, first, values, vocab_size, end, VEC, MASKED)


@triton.jit
def store_candidates(row, out, ids, topk_ids, coefficients, sum_of_all, reference, mass, factor, temperature, begin,
                     end, M: tl.constexpr):  # fmt: skip
    """The gradient at the candidates from `begin` to `end`, once for each id, whatever occurs twice."""
    here = (ids >= begin) & (ids < end)
    if tl.max(here.to(tl.int32), 0) > 0:
        total = tl.zeros(ids.shape, tl.float64)
        for i in range(M):
            same = ids == tl.load(topk_ids + i).to(tl.int64)
            total += tl.where(same, tl.load(coefficients + i).to(tl.float64), 0.0)
        x = tl.load(row + ids, mask=here, other=0.0).to(tl.float64)
        p = tl.exp((x - reference) / temperature) / mass
        values = (total - p * sum_of_all) * factor
        tl.store(out + ids, values.to(tl.float32).to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["parts", "at_a_time", "temperature"])
def logprobs_backward_kernel(logits, topk_ids, coefficients, state, scale, student_logits_gradient, inner, outer_stride,
                             inner_stride, width, vocab_size, parts, at_a_time, temperature, M: tl.constexpr,
                             M_PADDED: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
                             EXACT: tl.constexpr):  # fmt: skip
    temperature = float64(temperature)
    n = (tl.program_id(0) // parts).to(tl.int64)
    begin, end = part_of(tl.program_id(0) % parts, at_a_time, width)
    out = gradient_row(student_logits_gradient, n, width, VEC, ALIGNED)
    j = tl.arange(0, M_PADDED)
    own = tl.load(coefficients + n * M + j, mask=j < M, other=0.0).to(tl.float64)
    factor = tl.load(scale + n).to(tl.float64)
    if (factor != 0) & (tl.max((own != 0).to(tl.int32), 0) > 0):
        row = row_at(logits, n, inner, outer_stride, inner_stride, VEC, ALIGNED)
        reference, mass = tl.load(state + 2 * n).to(tl.float64), tl.load(state + 2 * n + 1).to(tl.float64)
        factor /= temperature
        sum_of_all = tl.sum(own, 0)
        from_p = as_computed(-sum_of_all * factor / mass, EXACT)
        at_0 = as_computed(reference, EXACT)
        whole = end_of_whole_blocks(begin, end, vocab_size)
        for first in range(begin, whole, BLOCK):
            write_block(row, out, first, vocab_size, end, at_0, from_p, temperature, VEC, EXACT, False)
        for first in range(whole, end, BLOCK):
            write_block(row, out, first, vocab_size, end, at_0, from_p, temperature, VEC, EXACT, True)
        tl.debug_barrier()  # what follows is stored over that
        ids = tl.load(topk_ids + n * M + j, mask=j < M, other=-1).to(tl.int64)
        store_candidates(row, out, ids, topk_ids + n * M, coefficients + n * M, sum_of_all, reference, mass, factor,
                         temperature, begin, tl.minimum(end, vocab_size), M)  # fmt: skip
    else:
        store_nothing(out, begin, end, VEC)


@for_any_axes
def logprobs_backward(a: Any) -> tuple[Tensor, ...]:
    m = a.topk_ids.shape[-1]
    inputs = (a.topk_ids, a.coefficients, a.state, a.scale)
    sizes = {"M": m, "M_PADDED": triton.next_power_of_2(m)}
    logits, temperatures = (a.student_logits,), (a.student_temperature,)
    return (gradient.run(logprobs_backward_kernel, logits, temperatures, a.vocab_size, inputs, **sizes),)

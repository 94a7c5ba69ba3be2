"""`logprobs_backward`: from the derivatives by the log-probabilities of candidates to the gradient of the logits."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import gradient
from .gradient import as_computed, exponential, part_of, write_part, write_zeros
from .position import for_any_axes, row_at
from .summary import float64


@triton.jit
def logprobs_derivative(x, y, terms, EXACT: tl.constexpr):
    """Return what every id gets; candidates are written over it."""
    reference, from_p, temperature = terms
    return from_p * exponential(x - reference, temperature, EXACT)


@triton.jit
def store_candidates(row, out, ids, topk_ids, coefficients, sum_of_all, reference, mass, factor, temperature, begin,
                     end, M: tl.constexpr):  # fmt: skip
    """Store the gradient at the candidates from `begin` to `end`, once for each id even if it occurs twice."""
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


@triton.jit(do_not_specialize=["parts", "at_a_time", "temperatures"])
def logprobs_backward_kernel(x, topk_ids, coefficients, state, scale, gradient, width, vocab_size, parts, at_a_time,
                             temperatures, M: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
                             EXACT: tl.constexpr):  # fmt: skip
    temperature = float64(temperatures[0])
    n, out, begin, end = part_of(gradient, width, parts, at_a_time, VEC, ALIGNED)
    topk_ids += n * M
    coefficients += n * M
    j = tl.arange(0, triton.next_power_of_2(M))
    own = tl.load(coefficients + j, mask=j < M, other=0.0).to(tl.float64)
    factor = tl.load(scale + n).to(tl.float64)
    if (factor != 0) & (tl.max((own != 0).to(tl.int32), 0) > 0):
        row = row_at(x, n, VEC, ALIGNED)
        reference, mass = tl.load(state + 2 * n).to(tl.float64), tl.load(state + 2 * n + 1).to(tl.float64)
        factor /= temperature
        sum_of_all = tl.sum(own, 0)
        terms = (as_computed(reference, EXACT), as_computed(-sum_of_all * factor / mass, EXACT), temperature)
        write_part(out, row, None, begin, end, vocab_size, terms, logprobs_derivative, VEC, EXACT)
        tl.debug_barrier()  # what follows is stored over that
        ids = tl.load(topk_ids + j, mask=j < M, other=-1).to(tl.int64)
        store_candidates(row, out, ids, topk_ids, coefficients, sum_of_all, reference, mass, factor, temperature, begin,
                         tl.minimum(end, vocab_size), M)  # fmt: skip
    else:
        write_zeros(out, begin, end, VEC)


@for_any_axes
def logprobs_backward(a: Any) -> tuple[Tensor, ...]:
    inputs = (a.topk_ids, a.coefficients, a.state, a.scale)
    return gradient.run(logprobs_backward_kernel, a, inputs, M=a.topk_ids.shape[-1])

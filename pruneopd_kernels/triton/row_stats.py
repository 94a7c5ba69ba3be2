"""`row_stats`: the pass over one model's rows; and `logprobs_backward`, which reads them again for the gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gradient
from .arguments import outputs_of
from .gradient import as_computed, distance, exponential, part_of, write_part, write_zeros
from .position import for_any_axes, row_at, run_at_positions
from .row_pass import WILD
from .selection import EMPTY, count, id_of, ranked
from .summary import float64, logprobs_at, state_of, store_all


@triton.jit
def row_stats_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars, K: tl.constexpr,
                       OPTION: tl.constexpr):  # fmt: skip
    """OPTION is the number of ids and whether the entropy is wanted."""
    logprobs, lse, entropy, state = outputs[0], outputs[1], outputs[2], outputs[3] + 3 * n
    M: tl.constexpr = OPTION[0]
    j = tl.arange(0, triton.next_power_of_2(M))
    ids = tl.load(inputs[0] + n * M + j, mask=j < M, other=-1).to(tl.int64)
    exists = (ids >= 0) & (ids < vocab_size)
    of_ids = tl.where(exists, logprobs_at(sides[0], ids, exists), tl.where(ids < 0, 0.0, float("nan")))
    tl.store(logprobs + n * M + j, of_ids, mask=j < M)
    _, _, of_row, uncertainty = sides[0][1]
    reference, mass, mean = state_of(sides[0])
    if not OPTION[1]:
        uncertainty, mean = tl.zeros([], tl.float64), reference - reference
    tl.store(lse + n, of_row.to(tl.float32))
    tl.store(entropy + n, uncertainty.to(tl.float32))
    store_all(state, (reference, mass, mean))
    if K > 0:
        best, rank = ranked(candidates[0], K)
        tl.store(outputs[4] + n * K + rank, id_of(best).to(tl.int64), mask=tl.arange(0, best.shape[0]) < K)
        tl.store(outputs[5] + n, count(best > EMPTY))


@for_any_axes
def row_stats(a: Any) -> tuple[Tensor, ...]:
    m = a.token_ids.shape[-1]
    (logprobs,), (topk_ids,) = outputs_of(a, torch.float64, last=(m,)), outputs_of(a, torch.int64, last=(a.k,))
    lse, entropy, filled = outputs_of(a, torch.float32, torch.float32, torch.int32)
    (state,) = outputs_of(a, torch.float64, last=(3,))
    outputs = [logprobs, lse, entropy, state, *([topk_ids, filled] if a.k else [])]
    run_at_positions(row_stats_position, a, (a.token_ids,), outputs, mask=a.mask, k=a.k,
                     stats=(1 if a.entropy else 0, 0), option=(m, a.entropy))  # fmt: skip
    return logprobs, entropy, lse, topk_ids, filled if a.k else filled.zero_(), state


@triton.jit
def logprobs_derivative(x, y, terms, EXACT: tl.constexpr):
    """Return what every id gets; candidates are written over it."""
    d = distance(x, terms[0], EXACT)
    p, factor = exponential(d, terms[1], EXACT), as_computed(terms[2], EXACT)
    if len(terms) > 3:  # an entropy has a part in it
        of_distance, nothing = as_computed(terms[3], EXACT), as_computed(terms[4], EXACT)
        factor = tl.where(p == 0, nothing, factor - of_distance * d)
    return p * factor, factor


@triton.jit
def store_candidates(row, out, ids, token_ids, coefficients, terms, temperature, begin, end,
                     M: tl.constexpr):  # fmt: skip
    """Store the gradient at the candidates from `begin` to `end`, once for each id even if it occurs twice."""
    here = (ids >= begin) & (ids < end)
    if tl.max(here.to(tl.int32), 0) > 0:
        total = tl.zeros(ids.shape, tl.float64)
        for i in range(M):
            same = ids == tl.load(token_ids + i).to(tl.int64)
            total += tl.where(same, tl.load(coefficients + i).to(tl.float64), 0.0)
        from_p, _ = logprobs_derivative(tl.load(row + ids, mask=here, other=0.0), None, terms, True)
        tl.store(out + ids, (total / temperature + from_p).to(tl.float32).to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["parts", "at_a_time", "temperatures", "is_tame"])
def logprobs_backward_kernel(x, token_ids, coefficients, state, entropy_coefficient, gradient, width, vocab_size, parts,
                             at_a_time, temperatures, is_tame, M: tl.constexpr, VEC: tl.constexpr,
                             ALIGNED: tl.constexpr):  # fmt: skip
    temperature = float64(temperatures[0])
    n, out, begin, end = part_of(gradient, width, parts, at_a_time, VEC, ALIGNED)
    token_ids += n * M
    coefficients += n * M
    j = tl.arange(0, triton.next_power_of_2(M))
    own = tl.load(coefficients + j, mask=j < M, other=0.0).to(tl.float64)
    is_used = tl.max((own != 0).to(tl.int32), 0) > 0
    of_entropy = tl.zeros([], tl.float64)
    if entropy_coefficient is not None:
        of_entropy = tl.load(entropy_coefficient + n).to(tl.float64)
        is_used |= of_entropy != 0
    if is_used:
        row = row_at(x, n, VEC, ALIGNED)
        reference, mass, mean = tl.load(state + 3 * n), tl.load(state + 3 * n + 1), tl.load(state + 3 * n + 2)
        total = tl.sum(own, 0)
        # 0, or NaN if any of them is not finite, in which case every id gets NaN.
        nothing = (total - total) + (of_entropy - of_entropy)
        nothing += (reference - reference) + (mass - mass) + (mean - mean)
        of_p = (of_entropy * mean - total) / (mass * temperature) + nothing
        of_distance = of_entropy / (mass * temperature * temperature)
        of_all, of_entropy_too = (reference, temperature, of_p), (reference, temperature, of_p, of_distance, nothing)
        terms = of_all if entropy_coefficient is None else of_entropy_too
        tame = (is_tame != 0) & ((tl.maximum(tl.abs(of_p), tl.abs(of_distance)) >= WILD) == 0)
        write_part(out, row, None, begin, end, vocab_size, terms, tame, logprobs_derivative, VEC)
        tl.debug_barrier()  # what follows is stored over that
        ids = tl.load(token_ids + j, mask=j < M, other=-1).to(tl.int64)
        store_candidates(row, out, ids, token_ids, coefficients, terms, temperature, begin, tl.minimum(end, vocab_size),
                         M)  # fmt: skip
    else:
        write_zeros(out, begin, end, VEC)


@for_any_axes
def logprobs_backward(a: Any) -> tuple[Tensor, ...]:
    inputs = (a.token_ids, a.coefficients, a.state, a.entropy_coefficient)
    return gradient.run(logprobs_backward_kernel, a, inputs, M=a.token_ids.shape[-1])

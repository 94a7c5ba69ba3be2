"""`reverse_kl`: the row pass with the student's divergence; and its backward pass, through both rows again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import loss_factor
from . import gradient
from .arguments import outputs_of
from .gradient import as_computed, distance, divided, exponential, part_of, write_part, write_zeros
from .position import for_any_axes, row_at, run_at_positions
from .row_pass import WILD
from .summary import float64_pair, store_divergence


@triton.jit
def reverse_kl_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars,
                        K: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    loss, state = outputs
    kl, _, excess = divergences
    kl = tl.where(broken, float("nan"), kl)
    total = kl
    if inputs[0] is not None:
        total *= tl.load(inputs[0] + n)
    total = total.to(tl.float32)
    tl.store(loss + n, total)
    store_divergence(state + 5 * n, sides, tl.where(tl.abs(total) < float("inf"), kl, float("nan")), excess)


@for_any_axes
def reverse_kl(a: Any) -> tuple[Tensor, ...]:
    outputs = [*outputs_of(a, torch.float32), *outputs_of(a, torch.float64, last=(5,))]
    factor = None
    if a.weight is not None or a.mask is not None:
        factor = loss_factor(a.weight, a.mask, a.student_logits[..., 0])
    used = None if factor is None else factor != 0
    run_at_positions(reverse_kl_position, a, (factor,), outputs, mask=used, stats=(2, 0))
    return tuple(outputs)


@triton.jit
def reverse_kl_derivative(x, y, terms, EXACT: tl.constexpr):
    """Return p (log p - log q - KL), 0 where p is 0; NaN everywhere if the offset is NaN."""
    x_reference, y_reference, offset, peak, of_peak, from_p, x_temperature, y_temperature = terms
    dx, dy, offset = distance(x, x_reference, EXACT), distance(y, y_reference, EXACT), as_computed(offset, EXACT)
    p = as_computed(from_p, EXACT) * exponential(dx, x_temperature, EXACT)
    excess = divided(dx, x_temperature, EXACT) - divided(dy, y_temperature, EXACT) - offset
    excess = tl.where(x == as_computed(peak, EXACT), as_computed(of_peak, EXACT), excess)
    return tl.where(p == 0, tl.where(offset == offset, 0.0, offset), p * excess), excess


@triton.jit(do_not_specialize=["parts", "at_a_time", "temperatures", "is_tame"])
def reverse_kl_backward_kernel(x, y, state, scale, gradient, width, vocab_size, parts, at_a_time, temperatures, is_tame,
                               VEC: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """x is the student, y the teacher."""
    x_temperature, y_temperature = float64_pair(temperatures)
    n, out, begin, end = part_of(gradient, width, parts, at_a_time, VEC, ALIGNED)
    factor = tl.load(scale + n).to(tl.float64)
    if factor != 0:
        state += 5 * n
        x_reference, mass, y_reference = tl.load(state), tl.load(state + 1), tl.load(state + 2)
        offset, of_peak = tl.load(state + 3), tl.load(state + 4)
        offset = tl.where(tl.abs(offset) < float("inf"), offset, float("nan"))
        # float32 cannot resolve the excess of a logit that has most of the mass, so the forward pass saved it.
        is_peaked = (mass < 1.5) & (offset == offset)
        peak = tl.where(is_peaked, x_reference, float("nan"))
        from_p = factor / x_temperature / mass
        terms = (x_reference, y_reference, offset, peak, of_peak, from_p, x_temperature, y_temperature)
        tame = (is_tame != 0) & ((tl.maximum(tl.abs(offset), tl.abs(from_p)) >= WILD) == 0)
        write_part(out, row_at(x, n, VEC, ALIGNED), row_at(y, n, VEC, ALIGNED), begin, end, vocab_size, terms, tame,
                   reverse_kl_derivative, VEC)  # fmt: skip
    else:
        write_zeros(out, begin, end, VEC)


@for_any_axes
def reverse_kl_backward(a: Any) -> tuple[Tensor, ...]:
    return gradient.run(reverse_kl_backward_kernel, a, (a.state, a.scale))

"""`reverse_kl`: the row pass with the student's divergence; and its backward pass, through both rows again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gradient
from .gradient import as_computed, divided, exponential, part_of, write_part, write_zeros
from .losses import is_finite, state_of, store_floats, used_positions
from .position import for_any_axes, row_at, run_at_positions
from .summary import float64_pair


@triton.jit
def reverse_kl_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars,
                        K: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    loss, state = outputs
    kl, _, excess = divergences
    nan = tl.full([], float("nan"), tl.float64)
    kl = tl.where(broken, nan, kl)
    total = kl
    if inputs[0] is not None:
        total *= tl.load(inputs[0] + n).to(tl.float64)
    store_floats((loss,), n, (total,))
    reference, mass = state_of(sides[0])
    teacher_reference, teacher_mass = state_of(sides[1])
    offset = tl.where(is_finite(total), kl + tl.log(mass) - tl.log(teacher_mass), nan)
    states = (state, state + 1, state + 2, state + 3, state + 4)
    store_floats(states, 5 * n, (reference, mass, teacher_reference, offset, excess))


@for_any_axes
def reverse_kl(a: Any) -> tuple[Tensor, ...]:
    shape = a.student_logits.shape[:-1]
    new: Any = a.student_logits.new_empty
    outputs = [new(shape, dtype=torch.float32), new((*shape, 5), dtype=torch.float32)]
    used = a.mask if a.weight is None else used_positions(a.mask, a.weight != 0)
    run_at_positions(reverse_kl_position, a, (a.weight,), outputs, mask=used, stats=1)
    return tuple(outputs)


@triton.jit
def reverse_kl_derivative(x, y, terms, EXACT: tl.constexpr):
    """Return p (log p - log q - KL), 0 where p is 0; NaN everywhere if the offset is NaN."""
    x_reference, y_reference, offset, peak, of_peak, from_p, x_temperature, y_temperature = terms
    dx, dy = x - x_reference, y - y_reference
    p = from_p * exponential(dx, x_temperature, EXACT)
    excess = divided(dx, x_temperature, EXACT) - divided(dy, y_temperature, EXACT) - offset
    excess = tl.where(x == peak, of_peak, excess)
    return tl.where(p == 0, tl.where(offset == offset, 0.0, offset), p * excess)


@triton.jit(do_not_specialize=["parts", "at_a_time", "temperatures"])
def reverse_kl_backward_kernel(x, y, state, scale, gradient, width, vocab_size, parts, at_a_time, temperatures,
                               VEC: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """x is the student, y the teacher."""
    x_temperature, y_temperature = float64_pair(temperatures)
    n, out, begin, end = part_of(gradient, width, parts, at_a_time, VEC, ALIGNED)
    factor = tl.load(scale + n).to(tl.float64)
    if factor != 0:
        state += 5 * n
        x_reference, mass = as_computed(tl.load(state), EXACT), tl.load(state + 1).to(tl.float64)
        y_reference, offset = as_computed(tl.load(state + 2), EXACT), as_computed(tl.load(state + 3), EXACT)
        offset = tl.where(tl.abs(offset) < float("inf"), offset, float("nan"))
        # float32 cannot resolve the excess of a logit that has most of the mass, so the forward pass saved it.
        is_peaked = (mass < 1.5) & (offset == offset)
        peak, of_peak = tl.where(is_peaked, x_reference, float("nan")), as_computed(tl.load(state + 4), EXACT)
        from_p = as_computed(factor / x_temperature / mass, EXACT)
        terms = (x_reference, y_reference, offset, peak, of_peak, from_p, x_temperature, y_temperature)
        write_part(out, row_at(x, n, VEC, ALIGNED), row_at(y, n, VEC, ALIGNED), begin, end, vocab_size, terms,
                   reverse_kl_derivative, VEC, EXACT)  # fmt: skip
    else:
        write_zeros(out, begin, end, VEC)


@for_any_axes
def reverse_kl_backward(a: Any) -> tuple[Tensor, ...]:
    return gradient.run(reverse_kl_backward_kernel, a, (a.state, a.scale))

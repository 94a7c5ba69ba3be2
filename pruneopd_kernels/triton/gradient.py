"""What the backward passes share: the gradient is written as the rows are read, a part of a row in each program.

What is written for an id depends on its row alone, so rows are split to fill the device. Arithmetic is in float32
relative to the row's reference; with EXACT, for extreme temperatures, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import device_of, float64_bits, per_position
from .position import is_aligned, logits_of, positions_of, processors, row_at, scale_of, temperatures_of, vector_size
from .row_pass import BLOCK, NUM_WARPS, block_ids
from .summary import LEAST_SCALE

PROGRAMS_PER_PROCESSOR = 8
WAVES = 8  # of programs, so that the last ones are a small part of the whole

LOG2_E = tl.constexpr(1.44269504088896340735992468100189214)


def run(kernel: Any, a: Any, inputs: Sequence[Tensor], **constants: Any) -> tuple[Tensor]:
    """Return the gradient of the student's logits, which the kernel writes."""
    logits, temperatures = logits_of(a), temperatures_of(a)
    gradient: Tensor = torch.empty_like(logits[0], memory_format=torch.contiguous_format)
    positions, width = math.prod(gradient.shape[:-1]), gradient.shape[-1]
    if positions == 0:
        return (gradient,)
    blocks = triton.cdiv(width, BLOCK.value)
    wanted = triton.cdiv(WAVES * PROGRAMS_PER_PROCESSOR * processors(gradient.device), positions)
    at_a_time = triton.cdiv(blocks, wanted)
    parts = triton.cdiv(blocks, at_a_time)
    with device_of(gradient):
        kernel[(positions * parts,)](
            *((x, *positions_of(x)) for x in logits), *map(per_position, inputs), gradient,
            width, width if a.vocab_size is None else a.vocab_size, parts, at_a_time,
            tuple(map(float64_bits, temperatures)),
            VEC=vector_size(logits), ALIGNED=all(map(is_aligned, (*logits, gradient))),
            EXACT=not all(LEAST_SCALE.value < scale_of(x) < 1 / LEAST_SCALE.value for x in temperatures),
            **constants, num_warps=NUM_WARPS,
        )  # fmt: skip
    return (gradient,)


@triton.jit
def part_of(gradient, width, parts, at_a_time, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a program's position, its row of the gradient, and the ids where its part begins and ends."""
    n = (tl.program_id(0) // parts).to(tl.int64)
    begin = tl.program_id(0) % parts * at_a_time * BLOCK
    end = tl.minimum(begin + at_a_time * BLOCK, width)
    return n, row_at((gradient, 1, width, 0), n, VEC, ALIGNED), begin, end


@triton.jit
def write_part(out, x_row, y_row, begin, end, vocab_size, terms, DERIVATIVE: tl.constexpr, VEC: tl.constexpr,
               EXACT: tl.constexpr):  # fmt: skip
    """Write DERIVATIVE of the rows' logits, 0 for ids beyond the vocabulary."""
    whole = begin + tl.maximum(tl.minimum(end, vocab_size) - begin, 0) // BLOCK * BLOCK  # nothing to mask before it
    for first in range(begin, whole, BLOCK):
        write_block(out, x_row, y_row, first, end, vocab_size, terms, DERIVATIVE, VEC, EXACT, False)
    for first in range(whole, end, BLOCK):
        write_block(out, x_row, y_row, first, end, vocab_size, terms, DERIVATIVE, VEC, EXACT, True)


@triton.jit
def write_zeros(out, begin, end, VEC: tl.constexpr):
    """Write the gradient of a position that has no part in the loss; its rows are not read."""
    write_part(out, None, None, begin, end, end, None, None, VEC, False)


@triton.jit
def write_block(out, x_row, y_row, first, end, vocab_size, terms, DERIVATIVE: tl.constexpr, VEC: tl.constexpr,
                EXACT: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    ids = first + block_ids(VEC)
    if DERIVATIVE is None:
        values = tl.zeros([BLOCK], tl.float32)
    else:
        x = load_block(x_row, ids, vocab_size, EXACT, MASKED)
        y = None if y_row is None else load_block(y_row, ids, vocab_size, EXACT, MASKED)
        values = DERIVATIVE(x, y, terms, EXACT)
    values = values.to(tl.float32).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + ids, tl.where(ids < vocab_size, values, 0.0), mask=ids < end)
    else:
        tl.store(out + ids, values)


@triton.jit
def load_block(row, ids, end, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """Return a block of a row, -inf beyond its end."""
    x = tl.load(row + ids, mask=ids < end, other=float("-inf")) if MASKED else tl.load(row + ids)
    return x.to(tl.float64 if EXACT else tl.float32)


@triton.jit
def divided(x, temperature, EXACT: tl.constexpr):
    if EXACT:
        return x / temperature
    else:
        return x * (1 / temperature).to(tl.float32)


@triton.jit
def exponential(distance, temperature, EXACT: tl.constexpr):
    """Return exp(distance / temperature)."""
    if EXACT:
        return tl.exp(distance / temperature)
    else:
        return tl.exp2(distance * (1 / temperature * LOG2_E).to(tl.float32))


@triton.jit
def as_computed(x, EXACT: tl.constexpr):
    return x.to(tl.float64 if EXACT else tl.float32)

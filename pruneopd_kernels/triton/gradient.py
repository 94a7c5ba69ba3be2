"""The backward passes' way through the logits: the gradient is written as the rows are read, a part of a row a program.

What is written for an id depends on its row alone, so rows are cut as it suits the device. Arithmetic is in float32
relative to the row's reference; EXACT, in float64, for temperatures out of all proportion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .arguments import device_of, float64_bits, per_position
from .position import is_aligned, positions_of, processors, scale_of, vector_size
from .row_pass import BLOCK, NUM_WARPS, block_ids
from .summary import LEAST_SCALE

PROGRAMS_PER_PROCESSOR = 8
WAVES = 8  # of programs, so that the last ones are a small part of the whole

LOG2_E = tl.constexpr(1.44269504088896340735992468100189214)


def run(
    kernel: Any,
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    vocab_size: int | None,
    inputs: Sequence[Tensor],
    **constants: Any,
) -> Tensor:
    """The gradient of the first of the logits, which the kernel writes."""
    student = logits[0]
    gradient = student.new_empty(student.shape)
    positions, width = math.prod(student.shape[:-1]), student.shape[-1]
    if positions == 0:
        return gradient
    blocks = triton.cdiv(width, BLOCK.value)
    wanted = triton.cdiv(WAVES * PROGRAMS_PER_PROCESSOR * processors(student.device), positions)
    at_a_time = triton.cdiv(blocks, wanted)
    parts = triton.cdiv(blocks, at_a_time)
    with device_of(student):
        kernel[(positions * parts,)](
            *logits, *map(per_position, inputs), gradient,
            *(number for x in logits for number in positions_of(x)),
            width, width if vocab_size is None else vocab_size, parts, at_a_time,
            *map(float64_bits, temperatures),
            VEC=vector_size(logits), ALIGNED=all(map(is_aligned, (*logits, gradient))),
            EXACT=not all(LEAST_SCALE.value < scale_of(x) < 1 / LEAST_SCALE.value for x in temperatures),
            **constants, num_warps=NUM_WARPS,
        )  # fmt: skip
    return gradient


@triton.jit
def part_of(part, at_a_time, width):
    begin = part * at_a_time * BLOCK
    return begin, tl.minimum(begin + at_a_time * BLOCK, width)


@triton.jit
def end_of_whole_blocks(begin, end, vocab_size):
    """Up to here nothing is to be masked."""
    return begin + tl.maximum(tl.minimum(end, vocab_size) - begin, 0) // BLOCK * BLOCK


@triton.jit
def gradient_row(gradient, n, width, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    offset = n * width
    if ALIGNED:
        offset = tl.multiple_of(offset, VEC)
    return gradient + offset


@triton.jit
def load_block(row, first, end, VEC: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr):
    """A block of a row, -inf beyond its end."""
    ids = first + block_ids(VEC)
    x = tl.load(row + ids, mask=ids < end, other=float("-inf")) if MASKED else tl.load(row + ids)
    return x.to(tl.float64 if EXACT else tl.float32)


@triton.jit
def store_block(row, first, values, vocab_size, end, VEC: tl.constexpr, MASKED: tl.constexpr):
    """Values of a block, 0 for ids beyond the vocabulary."""
    ids = first + block_ids(VEC)
    values = values.to(tl.float32).to(row.dtype.element_ty)
    if MASKED:
        tl.store(row + ids, tl.where(ids < vocab_size, values, 0.0), mask=ids < end)
    else:
        tl.store(row + ids, values)


@triton.jit
def store_nothing(row, begin, end, VEC: tl.constexpr):
    """The gradient of a row that has no part in the loss, and is not read."""
    zeros = tl.zeros([BLOCK], tl.float32)
    whole = end_of_whole_blocks(begin, end, end)
    for first in range(begin, whole, BLOCK):
        store_block(row, first, zeros, end, end, VEC, False)
    if whole < end:
        store_block(row, whole, zeros, end, end, VEC, True)


@triton.jit
def divided(x, temperature, EXACT: tl.constexpr):
    if EXACT:
        return x / temperature
    else:
        return x * (1 / temperature).to(tl.float32)


@triton.jit
def exponential(distance, temperature, EXACT: tl.constexpr):
    """exp(distance / temperature)."""
    if EXACT:
        return tl.exp(distance / temperature)
    else:
        return tl.exp2(distance * (1 / temperature * LOG2_E).to(tl.float32))


@triton.jit
def as_computed(x, EXACT: tl.constexpr):
    return x.to(tl.float64 if EXACT else tl.float32)

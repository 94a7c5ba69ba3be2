"""What the backward passes share: the gradient is written as the rows are read, a part of a row in each program.

What is written for an id depends on its row alone, so rows are split to fill the device. Arithmetic is in float32
relative to the row's reference. The part is written again in float64 if float32 might lose a term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import float64_bits, per_position
from .position import is_aligned, logits_of, positions_of, processors, row_at, scale_of, temperatures_of, vector_size
from .row_pass import BLOCK, LANES, NUM_WARPS, TILES, WILD, block_ids, by_lane
from .summary import LEAST_SCALE

PROGRAMS_PER_PROCESSOR = 8
WAVES = 8  # of programs, so that the last ones are a small part of the whole

EXACT_BLOCK = tl.constexpr(256)  # small, so that the loop in float32 keeps its registers
LOG2_E = tl.constexpr(1.44269504088896340735992468100189214)


def run(kernel: Any, a: Any, inputs: Sequence[Tensor | None], **constants: Any) -> tuple[Tensor]:
    """Return the gradient of the first logits, which the kernel writes."""
    logits, temperatures = logits_of(a), temperatures_of(a)
    gradient: Tensor = torch.empty_like(logits[0], memory_format=torch.contiguous_format)
    positions, width = math.prod(gradient.shape[:-1]), gradient.shape[-1]
    if positions == 0:
        return (gradient,)
    blocks = triton.cdiv(width, BLOCK.value)
    wanted = triton.cdiv(WAVES * PROGRAMS_PER_PROCESSOR * processors(gradient.device), positions)
    at_a_time = triton.cdiv(blocks, wanted)
    parts = triton.cdiv(blocks, at_a_time)
    with torch.cuda.device_of(gradient):
        kernel[(positions * parts,)](
            *((x, *positions_of(x)) for x in logits), *map(per_position, inputs), gradient,
            width, width if a.vocab_size is None else a.vocab_size, parts, at_a_time,
            tuple(map(float64_bits, temperatures)),
            int(all(LEAST_SCALE.value < scale_of(x) < 1 / LEAST_SCALE.value for x in temperatures)),
            VEC=vector_size(logits), ALIGNED=all(map(is_aligned, (*logits, gradient))), **constants,
            num_warps=NUM_WARPS,
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
def write_part(out, x_row, y_row, begin, end, vocab_size, terms, is_tame, DERIVATIVE: tl.constexpr,
               VEC: tl.constexpr):  # fmt: skip
    """Write DERIVATIVE of the rows' logits, 0 for ids beyond the vocabulary; in float64 unless the terms are tame.

    DERIVATIVE returns the values and what in them multiplies a probability.
    """
    if is_tame:
        greatest = tl.full([TILES, LANES], float("-inf"), tl.float32)
        whole = begin + tl.maximum(tl.minimum(end, vocab_size) - begin, 0) // BLOCK * BLOCK  # nothing to mask before it
        for first in range(begin, whole, BLOCK):
            greatest = write_block(out, x_row, y_row, first, end, vocab_size, terms, greatest, DERIVATIVE, VEC, False)
        for first in range(whole, end, BLOCK):
            greatest = write_block(out, x_row, y_row, first, end, vocab_size, terms, greatest, DERIVATIVE, VEC, True)
        if y_row is not None:
            is_tame = tl.max(greatest) < WILD
            tl.debug_barrier()  # what follows is stored over that
    if is_tame == 0:
        for first in range(begin, end, EXACT_BLOCK):
            write_exactly(out, x_row, y_row, first, end, vocab_size, terms, DERIVATIVE)


@triton.jit
def write_zeros(out, begin, end, VEC: tl.constexpr):
    """Write the gradient of a position that has no part in the loss; its rows are not read."""
    for first in range(begin, end, BLOCK):
        ids = first + block_ids(VEC)
        tl.store(out + ids, tl.zeros([BLOCK], out.dtype.element_ty), mask=ids < end)


@triton.jit
def write_block(out, x_row, y_row, first, end, vocab_size, terms, greatest, DERIVATIVE: tl.constexpr,
                VEC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    ids = first + block_ids(VEC)
    exists = ids < vocab_size if MASKED else None
    x, y = load_block(x_row, ids, exists, float("-inf")), load_block(y_row, ids, exists, 0.0)
    values, factors = DERIVATIVE(x, y, terms, False)
    if y_row is not None:
        greatest = tl.maximum(greatest, tl.max(by_lane(factors, VEC), 2))  # passes over the NaN of two -inf
    values = values.to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + ids, tl.where(exists, values, 0.0), mask=ids < end)
    else:
        tl.store(out + ids, values)
    return greatest


@triton.jit
def write_exactly(out, x_row, y_row, first, end, vocab_size, terms, DERIVATIVE: tl.constexpr):
    ids = first + tl.arange(0, EXACT_BLOCK)
    exists = ids < vocab_size
    x, y = load_block(x_row, ids, exists, float("-inf")), load_block(y_row, ids, exists, 0.0)
    values, _ = DERIVATIVE(x, y, terms, True)
    values = values.to(tl.float32).to(out.dtype.element_ty)
    tl.store(out + ids, tl.where(exists, values, 0.0), mask=ids < end)


@triton.jit
def load_block(row, ids, exists, other):
    """Return a block of a row, `other` for ids that don't exist; None without a row."""
    if row is None:
        return None
    elif exists is None:
        return tl.load(row + ids).to(tl.float32)
    else:
        return tl.load(row + ids, mask=exists, other=other).to(tl.float32)


@triton.jit
def distance(x, reference, EXACT: tl.constexpr):
    """Return x - reference, in float64 if EXACT."""
    return x.to(tl.float64) - reference if EXACT else x - reference.to(tl.float32)


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

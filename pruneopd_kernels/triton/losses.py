"""What the losses share: positions in use, log-probabilities of candidates, and what a backward pass needs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arguments import flags
from .summary import logprobs_at


def used_positions(mask: Tensor | None, counts: Tensor) -> Tensor:
    """Return which positions are read, as one axis: the valid ones that count in the loss."""
    used: Tensor = counts.contiguous().view(-1)
    return used if mask is None else used & (flags(mask) != 0)


@triton.jit
def logprobs_of_candidates(side, ids, vocab_size):
    """Return log p, NaN for ids beyond the vocabulary and -inf for padding."""
    exists = (ids >= 0) & (ids < vocab_size)
    return tl.where(exists, logprobs_at(side, ids, exists), tl.where(ids < 0, float("-inf"), float("nan")))


@triton.jit
def state_of(side):
    """Return what is saved of a row: a logit and the mass relative to it, both NaN if the row is broken."""
    reference, log_mass, _, _ = side[1]
    return reference, tl.where(reference == reference, tl.exp(log_mass), reference)


@triton.jit
def is_finite(loss):
    return tl.abs(loss.to(tl.float32)) < float("inf")


@triton.jit
def store_coefficients(coefficients, at, values, exists, loss):
    """Store the derivatives by the log-probabilities, NaN if the loss is not finite."""
    values = tl.where(is_finite(loss), values, float("nan"))
    tl.store(coefficients + at, values.to(tl.float32), mask=exists)


@triton.jit
def store_floats(outputs, at, values):
    for i in tl.static_range(len(outputs)):
        tl.store(outputs[i] + at, values[i].to(tl.float32))

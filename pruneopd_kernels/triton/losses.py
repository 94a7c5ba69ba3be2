"""What the losses share: which positions are used, log-probabilities at given ids, what a backward pass needs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .arguments import flags
from .summary import logprob


def used_positions(mask: Tensor | None, counts: Tensor) -> Tensor:
    """Which positions are to be read, one after the other: they are valid and have a part in the loss."""
    used: Tensor = counts.contiguous().view(-1)
    return used if mask is None else used & (flags(mask) != 0)


@triton.jit
def logprobs_at(row, ids, vocab_size, summary, temperature):
    """log p, NaN where there is no such id; -inf for padding."""
    exists = (ids >= 0) & (ids < vocab_size)
    logprobs = logprob(tl.load(row + ids, mask=exists, other=0.0), summary, temperature)
    return tl.where(exists, logprobs, tl.where(ids < 0, float("-inf"), float("nan")))


@triton.jit
def state_of(summary):
    """What is saved of a row: a logit and the mass relative to it; both NaN where the row is broken."""
    reference, log_mass, _, _ = summary
    return reference, tl.where(reference == reference, tl.exp(log_mass), reference)


@triton.jit
def is_finite(loss):
    return tl.abs(loss.to(tl.float32)) < float("inf")


@triton.jit
def store_coefficients(coefficients, at, values, exists, loss):
    """The derivatives by the log-probabilities; NaN where the loss is not finite."""
    values = tl.where(is_finite(loss), values, float("nan"))
    tl.store(coefficients + at, values.to(tl.float32), mask=exists)


@triton.jit
def store_floats(outputs, at, values):
    for i in tl.static_range(len(outputs)):
        tl.store(outputs[i] + at, values[i].to(tl.float32))

"""What is known of one row of logits: its candidates in order and its softmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of logits over the ids that exist, in float64."""

    topk_ids: Tensor  # [..., k]
    logprobs: Tensor  # [..., V], NaN where broken
    lse: Tensor
    broken: Tensor  # a NaN, a +inf, or no finite logit


def valid_positions(mask: Tensor | None, like: Tensor, shape: torch.Size) -> Tensor:
    """Where a position counts; without a mask, everywhere."""
    return torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else mask != 0


def float_type(*logits: Tensor) -> torch.dtype:
    """The dtype of what is computed from logits: float32, unless some are float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def read_rows(logits: Tensor, valid: Tensor, vocab_size: int, k: int, temperature: float) -> Rows:
    """Candidates and softmax of every row; a masked row is read as zeros, whatever is in it."""
    x = torch.where(valid[..., None], logits[..., :vocab_size].to(torch.float64), 0.0)
    broken = (x.isnan() | (x == torch.inf)).any(-1) | ~x.isfinite().any(-1)
    scaled = x / temperature
    # Not scaled - lse: beside a logit of 1e38 the log of the sum would be lost in lse.
    logprobs = torch.log_softmax(scaled, -1).masked_fill(broken[..., None], torch.nan)
    return Rows(topk_ids(x, k), logprobs, torch.logsumexp(scaled, -1), broken)


def topk_ids(x: Tensor, k: int) -> Tensor:
    """The first k ids of the order: descending logit; equal logits, lower id first; -0 == +0; NaN before everything."""
    # A radix sort looks at the bits of -0 and of NaN: there must be one of each.
    x = x.masked_fill(x == 0, 0.0).masked_fill(x.isnan(), torch.nan)
    return (
        torch.sort(x, dim=-1, descending=True, stable=True)
        .indices[..., :k]
        .clone(memory_format=torch.contiguous_format)
    )


def entropy(rows: Rows) -> Tensor:
    p = rows.logprobs.exp()
    terms = torch.where(p == 0, 0.0, -p * rows.logprobs)
    return terms.sum(-1)


def kl_divergence(p: Rows, q: Rows) -> Tensor:
    """KL(p || q), +inf where an id has log q = -inf < log p, even if p is too small for a float64."""
    difference = torch.where(p.logprobs == q.logprobs, 0.0, p.logprobs - q.logprobs)
    terms = torch.where(p.logprobs == -torch.inf, 0.0, p.logprobs.exp() * difference)
    impossible = (q.logprobs == -torch.inf) & (p.logprobs > -torch.inf)
    kl = terms.masked_fill(impossible, torch.inf).sum(-1).clamp(min=0.0)
    return kl.masked_fill(p.broken | q.broken, torch.nan)

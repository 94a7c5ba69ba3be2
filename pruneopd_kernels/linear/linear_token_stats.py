"""`linear_token_stats`: what `token_stats` returns, from both models' hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import TokenStats
from ._chunks import Fields, Sides
from ._declaration import from_hidden_states
from ._positions import take, valid_places
from ._scoring import scalars


@from_hidden_states("token_stats")
def linear_token_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
    **arguments: Any,
) -> TokenStats:
    """Return `token_stats` of `logits = hidden @ weight.T + bias`, with at most `chunk_size` positions of logits alive.

    The statistics of whole responses are small. `reliability_from_topk` and `opd_rewards` take them from there, so a
    caller needs no loop over chunks. Products, autocast and masks are as in `linear_reliability`.

    Returns:
        The fields of `TokenStats`. None is differentiable.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels.linear import linear_token_stats
        >>> student, teacher, head = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> linear_token_stats(student, head, teacher, head, k=4).overlap.shape
        torch.Size([2, 5])
    """
    ...


@torch.no_grad()
def compute(a: Any) -> TokenStats:
    sides, fields = Sides(a), Fields(a.student_hidden.shape[:-1])
    for places in valid_places(fields.shape, a.mask, a.student_hidden.device).split(a.chunk_size):
        _, logits = sides.logits(places)
        token_ids = None if a.token_ids is None else take(a.token_ids, places)
        stats = a.passes.run("token_stats", **logits, token_ids=token_ids, **scalars("token_stats", a))
        fields.put(places, stats._asdict())
    return TokenStats(**fields)

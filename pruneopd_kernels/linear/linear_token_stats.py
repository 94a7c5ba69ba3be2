"""`linear_token_stats`: what `token_stats` returns, from both models' hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import TokenStats, token_stats
from ._declaration import from_hidden_states, options
from ._forward import Fields, Logits, problem_of
from ._positions import take, valid_places
from ._products import without_autocast


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
    chunk_size: int | None = None,
    **arguments: Any,
) -> TokenStats:
    """Return `token_stats` of `logits = hidden @ weight.T + bias`, with at most `chunk_size` positions of logits alive.

    The statistics of whole responses are small. `reliability_from_topk` and `opd_rewards` take them from there, so a
    caller needs no loop over chunks. Products, autocast and masks are as in `linear_reliability`.

    Returns:
        The fields of `TokenStats`. None is differentiable.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

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
    problem, fields = problem_of(a), Fields(a.student_hidden.shape[:-1])
    places = valid_places(fields.shape, a.mask, a.student_hidden.device)
    with without_autocast(a.student_hidden):
        both = filter(None, (problem.student, problem.teacher))
        sides = [Logits(side, problem.chunk_size, len(places)) for side in both]
        for chunk in places.split(problem.chunk_size):  # one, and empty, if there is no valid position
            student_logits, teacher_logits = (side.of(chunk)[1] for side in sides)
            token_ids = None if a.token_ids is None else take(a.token_ids, chunk)
            stats = token_stats(student_logits, teacher_logits, token_ids=token_ids, **options("token_stats", a))
            fields.put(chunk, stats._asdict())
    return TokenStats(**fields)

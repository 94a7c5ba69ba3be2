"""`linear_reliability`: what `reliability` returns, from both models' hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Reliability
from ._declaration import from_hidden_states
from ._forward import Fields, computed_chunks, positions_of, problem_of
from ._products import without_autocast


@from_hidden_states("reliability")
def linear_reliability(
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
) -> Reliability:
    """Return `reliability` of `logits = hidden @ weight.T + bias`, with at most `chunk_size` positions of logits alive.

    The valid positions are taken response by response, and the count of drifts is carried from chunk to chunk. The
    answer is that of `reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12, 14-16) on the same logits, bit for bit.
    torch computes the matrix products; a masked position costs none. Under autocast, hidden states, weights and biases
    are rounded to its dtype and the logits are float32. Otherwise all tensors of one model have one dtype, and so have
    its logits.

    Returns:
        The fields of `Reliability`. None is differentiable.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import linear_reliability, reliability
        >>> student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> head = torch.randn(100, 8)
        >>> out = linear_reliability(student, head, teacher, head, k=4)
        >>> torch.equal(out.drift_count, reliability(student @ head.T, teacher @ head.T, k=4).drift_count)
        True
    """
    ...


@torch.no_grad()
def compute(a: Any) -> Reliability:
    problem = problem_of(a)
    with without_autocast(a.student_hidden):
        positions = positions_of(problem)
        fields = Fields(positions.shape)
        for computed in computed_chunks(problem, positions):
            fields.put_computed(computed, problem.dtype)
        return fields.reliability(a)

"""`linear_reliability`: what `reliability` returns, from both models' hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import Reliability
from ._chunks import Fields, Sides, scored_chunks
from ._declaration import from_hidden_states


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
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
    **arguments: Any,
) -> Reliability:
    """Return `reliability` of `logits = hidden @ weight.T + bias`, with at most `chunk_size` positions of logits alive.

    The valid positions are taken response by response, and the count of drifts is carried from chunk to chunk. The
    answer is that of `reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12, 14-16) on the same logits, bit for bit.
    torch computes the matrix products; a masked position costs none. Logits are float32, regardless of the dtype of
    hidden states and weights: products of half-precision numbers are summed in float32. All tensors of one model have
    one dtype. Under autocast they may differ, and are rounded to its dtype.

    Returns:
        The fields of `Reliability`. None is differentiable.

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
    fields = Fields(a.student_hidden.shape[:-1])
    for chunk in scored_chunks(a, Sides(a)):
        fields.put_scored(chunk)
    along = fields.along(a)
    return Reliability(**{name: along[name] for name in Reliability._fields})

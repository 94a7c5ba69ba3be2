"""The backward pass that the losses over candidates share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._losses import full_width, probabilities


def logprobs_backward(a: Any) -> tuple[Tensor]:
    """Compute the gradient of `scale * sum(coefficients * log p[topk_ids])`.

    Candidates below 0 or beyond the vocabulary are part of the sum, and have no logit here.
    """
    size = a.vocab_size or a.student_logits.shape[-1]
    used = (a.scale != 0) & (a.coefficients != 0).any(-1)
    coefficients, scale = a.coefficients.to(torch.float64), a.scale.to(torch.float64)
    p = probabilities(a.student_logits, a.state, used, size, a.student_temperature)
    gradient = -p * coefficients.sum(-1, keepdim=True)
    exists = (a.topk_ids >= 0) & (a.topk_ids < size)
    ids = torch.where(exists, a.topk_ids.to(torch.int64), 0)
    gradient = gradient.scatter_add(-1, ids, torch.where(exists, coefficients, 0.0))
    return (full_width(a.student_logits, gradient * (scale / a.student_temperature)[..., None], used),)

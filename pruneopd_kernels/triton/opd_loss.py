"""`opd_scores`: what `reliability` does, with acceptance, entropies and KL from the same read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reliability import score


def opd_scores(a: Any) -> tuple[Tensor, ...]:
    shape = a.student_logits.shape[:-1]
    new: Any = a.student_logits.new_empty
    accepted = new(shape, dtype=torch.bool)
    more = [new(shape, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.float64)]
    more.append(new((*shape, 5), dtype=torch.float64))
    outputs = (accepted.view(torch.int8), *more)
    return *score(a, a.token_ids, a.weight, outputs, a.entropies, a.divergence), accepted, *more

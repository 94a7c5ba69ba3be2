"""`opd_scores`: what `reliability` does, with acceptance, entropies and KL from the same read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import outputs_of
from .reliability import score


def opd_scores(a: Any) -> tuple[Tensor, ...]:
    accepted, *more = outputs_of(a, torch.bool, torch.float32, torch.float32, torch.float64)
    more += outputs_of(a, torch.float64, last=(5,))
    outputs = (accepted.view(torch.int8), *more)
    return *score(a, a.token_ids, a.weight, outputs, a.entropies, a.divergence), accepted, *more

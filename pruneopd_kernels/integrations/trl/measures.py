"""A batch's statistics of drift: sums that can be added over processes, and the means that are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BANDS = 8
"""The weight by depth is a mean over each of this many equal parts of the longest response."""


def sums_of(scored: Any, mask: Tensor, longest: int | None) -> Tensor:
    """Return float64 sums `[7 + 2 * BANDS]` over responses `[B, T]`; without `longest` the bands are empty.

    A response begins at its first valid position: with a server, TRL's tensors begin at the end of the batch's shortest
    prompt.
    """
    begins = mask.int().argmax(1, keepdim=True) if mask.shape[1] else 0
    depth = (torch.arange(mask.shape[1], device=mask.device) - begins).clamp(min=0)
    band = (depth * BANDS // longest).clamp(max=BANDS - 1) if longest is not None else torch.full_like(depth, BANDS)
    sums = [
        torch.tensor(len(mask), device=mask.device),
        scored.effective_length.sum(),
        (mask & (scored.drift_count == 0)).sum(),
        mask.sum(),
        scored.overlap.double().sum(),
        scored.drift.sum(),
        scored.weight.double().sum(),
    ]
    by_band = [torch.where(band == i, x.double(), 0).sum() for x in (scored.weight, mask) for i in range(BANDS)]
    return torch.stack([x.double() for x in [*sums, *by_band]])


def means_of(sums: Tensor) -> dict[str, float]:
    """Return the means by name, without those that have nothing to average."""
    responses, effective_length, before_drift, tokens, overlap, drift, weight, *bands = sums.tolist()
    found = {
        "effective_length": (effective_length, responses),
        "first_drift_position": (before_drift, responses),
        "overlap": (overlap, tokens),
        "drift_rate": (drift, tokens),
        "weight": (weight, tokens),
    }
    for band in range(BANDS):
        found[f"weight_depth_{band + 1}"] = bands[band], bands[BANDS + band]
    return {name: total / count for name, (total, count) in found.items() if count}

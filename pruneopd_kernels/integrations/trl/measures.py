"""A batch's statistics of drift: totals that can be added over processes, and the means that are logged."""

from collections.abc import Mapping

import torch
from torch import Tensor

BANDS = 8
"""The weight by depth is a mean over each of this many equal parts of the longest response."""
OF_TOKENS = {"overlap": "overlap", "drift_rate": "drift", "weight": "weight", "acceptance": "accepted"}
"""What is logged of tokens: the name, and that of the values by position."""


def totals_of(scored: Mapping[str, Tensor], mask: Tensor, longest: int | None) -> dict[str, Tensor]:
    """Return float64 `[2]` by name: the sum over responses `[B, T]`, and how many values it has.

    Without `longest` there is no weight by depth, without a teacher's entropy no gap. A response begins at its first
    valid position: with a server, TRL's tensors begin at the end of the batch's shortest prompt.
    """

    def total(values: Tensor, among: Tensor) -> Tensor:
        return torch.stack([values.double().sum(), among.double().sum()])

    responses = torch.ones(len(mask), device=mask.device)
    totals = {
        "effective_length": total(scored["effective_length"], responses),
        "first_drift_position": total(mask & (scored["drift_count"] == 0), responses),
        **{name: total(scored[field], mask) for name, field in OF_TOKENS.items()},
    }
    if "teacher_entropy" in scored:  # eq. 4
        totals["entropy_gap"] = total((scored["entropy"] - scored["teacher_entropy"]).abs(), mask)
    if longest is not None:
        begins = mask.int().argmax(1, keepdim=True) if mask.shape[1] else 0
        depth = (torch.arange(mask.shape[1], device=mask.device) - begins).clamp(min=0)
        band = (depth * BANDS // longest).clamp(max=BANDS - 1)
        for i in range(BANDS):
            totals[f"weight_depth_{i + 1}"] = total(scored["weight"] * (band == i), mask & (band == i))
    return totals


def means_of(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means by name, without those that have nothing to average."""
    pairs = {name: pair.tolist() for name, pair in totals.items()}
    return {name: total / count for name, (total, count) in pairs.items() if count}

"""Sums over a step's tokens and responses, from which what is logged is computed, over all processes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import BANDS
from .methods import Advantages
from .scoring import Scores


class Sums:
    """Adds up micro-batches; a sum in float64 is exact enough for any count and the same to rounding in any order."""

    def __init__(self, maximum_length: int) -> None:
        """Starts at 0."""
        self.maximum_length = maximum_length
        self.sums: dict[str, Tensor] = {}

    def add(self, scores: Scores, given: Advantages, losses: Tensor) -> None:
        """Takes in B responses; `losses` are `[B, T]`."""
        mask, drift = scores.mask, scores.drift
        before_drift = (mask & (drift.cumsum(1) == 0)).sum(1)
        band = torch.arange(mask.shape[1], device=mask.device) * BANDS // self.maximum_length
        bands = torch.nn.functional.one_hot(band.clamp_max(BANDS - 1), BANDS).double()
        found = {
            "responses": torch.tensor(mask.shape[0]),
            "tokens": mask.sum(),
            "tokens_kept": ((given.weight != 0) | (given.values != 0).any(-1)).sum(),
            "overlap": scores.overlap.double().sum(),
            "drift": drift.sum(),
            "before_drift": before_drift.sum(),
            "effective_length": scores.effective_length.sum(),
            "weight": given.weight.double().sum(),
            "accepted": scores.accepted.sum(),
            "entropy_gap": scores.entropy_gap.double().sum(),
            "reverse_kl": scores.reverse_kl.double().sum(),
            "loss": losses.double().sum(),
            "band_tokens": mask.double().sum(0) @ bands,
            "band_overlap": scores.overlap.double().sum(0) @ bands,
            "band_weight": given.weight.double().sum(0) @ bands,
        }
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()

    def means(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The means over the tokens and responses of all processes; `total` sums a tensor over them."""
        names = sorted(self.sums)
        flat = total(torch.cat([self.sums[name].reshape(-1).cpu() for name in names]))
        sizes = [self.sums[name].numel() for name in names]
        sums = {name: part.tolist() for name, part in zip(names, flat.split(sizes), strict=True)}
        one = {name: values[0] for name, values in sums.items()}
        per_token = {
            "overlap": "overlap",
            "drift_rate": "drift",
            "weight_mean": "weight",
            "acceptance": "accepted",
            "entropy_gap": "entropy_gap",
            "reverse_kl": "reverse_kl",
            "loss": "loss",
        }
        per_response = {
            "response_length_mean": "tokens",
            "first_drift_mean": "before_drift",
            "effective_length_mean": "effective_length",
        }
        counts = sums["band_tokens"]
        return {
            "tokens_kept": int(one["tokens_kept"]),
            **{name: one[key] / one["tokens"] for name, key in per_token.items()},
            **{name: one[key] / one["responses"] for name, key in per_response.items()},
            "band_tokens": counts,
            **{
                name: [value / n if n else None for value, n in zip(sums[name], counts, strict=True)]
                for name in ("band_overlap", "band_weight")
            },
        }


def peak_memory_mib(device: torch.device) -> float:
    """The most memory so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

"""Sums over a step's tokens and responses, from which the logged metrics are computed, over all processes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .config import BANDS
from .methods import Advantages
from .scoring import Scores

PER_TOKEN = ["overlap", "drift_rate", "weight_mean", "acceptance", "entropy_gap", "reverse_kl", "loss"]
PER_RESPONSE = ["response_length_mean", "first_drift_mean", "effective_length_mean"]


class Sums:
    """Adds up micro-batches; a sum in float64 is exact enough for any count and the same to rounding in any order."""

    def __init__(self, maximum_length: int) -> None:
        self.maximum_length = maximum_length
        self.sums: dict[str, Tensor] = {}

    def add(self, scores: Scores, given: Advantages, losses: Tensor) -> None:
        """Add B responses; `losses` are `[B, T]`."""
        mask = scores.mask
        band = torch.arange(mask.shape[1], device=mask.device) * BANDS // self.maximum_length
        bands = torch.nn.functional.one_hot(band.clamp_max(BANDS - 1), BANDS).double()
        found = {
            "overlap": scores.overlap,
            "drift_rate": scores.drift,
            "weight_mean": given.weight,
            "acceptance": scores.accepted,
            "entropy_gap": scores.entropy_gap,
            "reverse_kl": scores.reverse_kl,
            "loss": losses,
            "tokens_kept": (given.weight != 0) | (given.values != 0).any(-1),
            "responses": mask.any(1),
            "response_length_mean": mask,
            "tokens": mask,
            "first_drift_mean": mask & (scores.drift.cumsum(1) == 0),
            "effective_length_mean": scores.effective_length,
        }
        sums = {name: values.double().sum() for name, values in found.items()}
        for name, values in (("tokens", mask), ("overlap", scores.overlap), ("weight", given.weight)):
            sums[f"band_{name}"] = values.double().sum(0) @ bands
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def means(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the means over the tokens and responses of all processes; `total` sums a tensor over them."""
        names = sorted(self.sums)
        flat = total(torch.cat([self.sums[name].reshape(-1).cpu() for name in names]))
        sizes = [self.sums[name].numel() for name in names]
        sums = {name: part.tolist() for name, part in zip(names, flat.split(sizes), strict=True)}
        one, counts = {name: values[0] for name, values in sums.items()}, sums["band_tokens"]
        bands = {name: zip(sums[name], counts, strict=True) for name in ("band_overlap", "band_weight")}
        return {
            "tokens_kept": int(one["tokens_kept"]),
            **{name: one[name] / one["tokens"] for name in PER_TOKEN},
            **{name: one[name] / one["responses"] for name in PER_RESPONSE},
            "band_tokens": counts,
            **{name: [value / n if n else None for value, n in band] for name, band in bands.items()},
        }


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory used so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

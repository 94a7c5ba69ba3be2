"""Along a response: cumulative drift C, reliability R, weight L, effective length E (eq. 8-10, 12)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..results import ReliabilityFromDrift
from ._checking import check
from ._rows import valid_positions


def reliability_from_drift(
    drift: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
) -> ReliabilityFromDrift:
    """The definition of `pruneopd_kernels.reliability_from_drift`."""
    check(
        "reliability_from_drift",
        drift=drift,
        mask=mask,
        cu_seqlens=cu_seqlens,
        drift_count=drift_count,
        w_drop=w_drop,
        w_base=w_base,
        eps=eps,
    )
    valid = valid_positions(mask, drift, drift.shape)
    return scan(drift, valid, cu_seqlens, drift_count, w_drop, w_base, eps)


def scan(
    drift: Tensor,
    valid: Tensor,
    cu_seqlens: Tensor | None,
    drift_count: Tensor | None,
    w_drop: float,
    w_base: float,
    eps: float,
) -> ReliabilityFromDrift:
    """C, R, L and E of drift at valid positions; padded responses are packed ones of one length."""
    if cu_seqlens is None:
        responses, length = drift.shape
        cu_seqlens = torch.arange(responses + 1, device=drift.device) * length
    cu_seqlens = cu_seqlens.to(torch.int64).clamp(0, drift.numel())
    response = torch.searchsorted(
        cu_seqlens[1:].contiguous(), torch.arange(drift.numel(), device=drift.device), right=True
    )

    def since_start(flags: Tensor) -> tuple[Tensor, Tensor]:
        """Number of flags up to and including each position, and in each response."""
        total = torch.cat([cu_seqlens.new_zeros(1), flags.flatten().cumsum(0)])
        return total[1:] - total[cu_seqlens[response]], total[cu_seqlens[1:]] - total[cu_seqlens[:-1]]

    count, _ = since_start(drift & valid)
    if drift_count is not None:
        # A position beyond the last response carries nothing in.
        count = count + torch.cat([drift_count, drift_count.new_zeros(1)])[response]
    count = count.clamp(max=torch.iinfo(torch.int32).max).view(drift.shape)
    lost = w_drop * count.to(torch.float64)  # rounded before the difference: no fused multiply-add
    reliability = (1.0 - lost).clamp(0.0, 1.0)
    weight = reliability + w_base
    _, effective_length = since_start(valid & (reliability > eps))
    return ReliabilityFromDrift(
        count.to(torch.int32),
        torch.where(valid, reliability, 0.0).to(torch.float32),
        torch.where(valid, weight, 0.0).to(torch.float32),
        effective_length.to(torch.int32),
    )

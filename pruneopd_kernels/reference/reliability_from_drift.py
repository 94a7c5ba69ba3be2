"""Along a response: cumulative drift C, reliability R, weight L, effective length E (eq. 8-10, 12)."""

from __future__ import annotations

from torch import Tensor

from ..formulas import scan, valid_positions
from ..results import ReliabilityFromDrift
from ._checking import check


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
    return ReliabilityFromDrift(*scan(drift, valid, cu_seqlens, drift_count, w_drop, w_base, eps))

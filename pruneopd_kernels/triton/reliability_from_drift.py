"""`reliability_from_drift`: the scan alone."""

from __future__ import annotations

from torch import Tensor

from .scan import scan


def reliability_from_drift(
    *,
    drift: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    drift_count: Tensor | None,
    w_drop: float,
    w_base: float,
    eps: float,
) -> tuple[Tensor, ...]:
    return scan(drift, mask, cu_seqlens, drift_count, w_drop, w_base, eps)

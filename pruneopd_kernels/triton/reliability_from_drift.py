"""`reliability_from_drift`: the scan alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .scan import scan


def reliability_from_drift(a: Any) -> tuple[Tensor, ...]:
    return scan(a.drift, a.mask, a.cu_seqlens, a.drift_count, a.w_drop, a.w_base, a.eps)

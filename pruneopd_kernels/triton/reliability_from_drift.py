"""`reliability_from_drift`: the scan alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .scan import scan


def reliability_from_drift(a: Any) -> tuple[Tensor, ...]:
    return scan(a.drift, a)[:4]

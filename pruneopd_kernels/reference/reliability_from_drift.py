"""Along a response: cumulative drift C, reliability R, weight L, effective length E (eq. 8-10, 12)."""

from typing import Any

from ..formulas import scan, valid_positions
from ..ops import ReliabilityFromDrift


def reliability_from_drift(a: Any) -> ReliabilityFromDrift:
    valid = valid_positions(a.mask, a.drift, a.drift.shape)
    return ReliabilityFromDrift(*scan(a.drift, valid, a))

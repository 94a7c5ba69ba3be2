"""One operator per file; the files with an underscore are what they share: registration, choice of implementation."""

from .reliability import reliability
from .reliability_from_drift import reliability_from_drift
from .reliability_from_topk import reliability_from_topk
from .token_stats import token_stats

__all__ = ["reliability", "reliability_from_drift", "reliability_from_topk", "token_stats"]

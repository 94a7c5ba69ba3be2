"""The operators as Triton kernels, for any GPU that Triton knows. Imported when first used: triton takes a second."""

from .reliability import reliability
from .reliability_from_drift import reliability_from_drift
from .reliability_from_topk import reliability_from_topk
from .token_stats import token_stats

__all__ = ["reliability", "reliability_from_drift", "reliability_from_topk", "token_stats"]

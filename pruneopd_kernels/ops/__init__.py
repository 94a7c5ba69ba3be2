"""One operator per file; the files with an underscore are what they share: registration, choice of implementation."""

from .reliability import reliability
from .reliability_from_drift import reliability_from_drift
from .reliability_from_topk import reliability_from_topk
from .reverse_kl import reverse_kl
from .token_stats import token_stats
from .topk_forward_kl import topk_forward_kl
from .topk_policy_loss import topk_policy_loss

__all__ = [
    "reliability",
    "reliability_from_drift",
    "reliability_from_topk",
    "reverse_kl",
    "token_stats",
    "topk_forward_kl",
    "topk_policy_loss",
]

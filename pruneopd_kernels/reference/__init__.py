"""The operators in plain PyTorch: the definition that every implementation is held to.

The same signatures as in `pruneopd_kernels`, without `impl`, on any device. All that is computed from logits is
computed in float64 and rounded once, to float32; float64 logits are taken too, and then stay float64.
"""

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

"""The operators as Triton kernels, for any GPU that Triton knows. Imported when first used: triton takes a second."""

from .logprobs_backward import logprobs_backward
from .reliability import reliability
from .reliability_from_drift import reliability_from_drift
from .reliability_from_topk import reliability_from_topk
from .reverse_kl import reverse_kl, reverse_kl_backward
from .token_stats import token_stats
from .topk_forward_kl import topk_forward_kl
from .topk_policy_loss import topk_policy_loss

__all__ = [
    "logprobs_backward",
    "reliability",
    "reliability_from_drift",
    "reliability_from_topk",
    "reverse_kl",
    "reverse_kl_backward",
    "token_stats",
    "topk_forward_kl",
    "topk_policy_loss",
]

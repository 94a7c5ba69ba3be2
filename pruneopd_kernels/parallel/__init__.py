"""The operators over a vocabulary that is split over the ranks of a `torch.distributed` group.

The functions take what their namesakes in `pruneopd_kernels` take, each rank its own slice of the logits, and return
the same answer on every rank. The files with an underscore are what they share: `_agreement` and `_exchange` talk to
the other ranks, `_slice` looks at this rank's logits, `_rows` and `_loss` put whole rows together.
"""

from .reliability import reliability
from .reverse_kl import reverse_kl
from .token_stats import token_stats
from .topk_forward_kl import topk_forward_kl
from .topk_policy_loss import topk_policy_loss

__all__ = ["reliability", "reverse_kl", "token_stats", "topk_forward_kl", "topk_policy_loss"]

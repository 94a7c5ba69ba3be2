"""The operators over a vocabulary that is split over the ranks of a `torch.distributed` group.

The functions take what their namesakes in `pruneopd_kernels` take, each rank its own slice of the logits, and return
the same answer on every rank. See docs/parallel.md.
"""

from .token_stats import token_stats

__all__ = ["token_stats"]

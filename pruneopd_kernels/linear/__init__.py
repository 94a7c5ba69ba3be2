"""Functions from hidden states: only the logits of some positions exist at a time.

One function per file. The files with an underscore are what they share, from the declaration to the backward pass.
"""

from .linear_opd_loss import LinearOpdLoss, linear_opd_loss
from .linear_reliability import linear_reliability
from .linear_selected_logprobs import linear_selected_logprobs
from .linear_token_stats import linear_token_stats

__all__ = ["LinearOpdLoss", "linear_opd_loss", "linear_reliability", "linear_selected_logprobs", "linear_token_stats"]

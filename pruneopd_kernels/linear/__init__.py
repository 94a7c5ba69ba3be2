"""From hidden states: reliability and losses where the logits of both heads exist for some positions at a time only.

One operator per file; the files with an underscore are what they share: which positions, the matrix products, what is
done with a chunk's logits, the two passes of a loss.
"""

from .linear_opd_loss import LinearOpdLoss, linear_opd_loss
from .linear_reliability import linear_reliability

__all__ = ["LinearOpdLoss", "linear_opd_loss", "linear_reliability"]

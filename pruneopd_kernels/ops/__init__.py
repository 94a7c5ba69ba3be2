"""The operators, one declared in each file; the files with an underscore are what they share.

Importing this package imports no torch. `pruneopd_kernels.dispatch` makes operators for torch of the declarations.
"""

from ._operator import BACKWARD_PASSES, FORWARD_PASSES, OPERATORS, Operator
from .opd_loss import OpdLoss, opd_loss
from .reliability import Reliability, reliability
from .reliability_from_drift import ReliabilityFromDrift, reliability_from_drift
from .reliability_from_topk import ReliabilityFromTopk, reliability_from_topk
from .reverse_kl import reverse_kl
from .selected_logprobs import SelectedLogprobs, selected_logprobs
from .token_stats import TokenStats, token_stats
from .topk_forward_kl import TopkForwardKl, topk_forward_kl
from .topk_policy_loss import topk_policy_loss

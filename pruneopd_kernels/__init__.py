"""Operators for prune-aware on-policy distillation (Prune-OPD, arXiv:2605.07804).

The names below are imported when they are first used. Importing the installed package imports neither torch nor NumPy,
and `pruneopd_kernels.host` works without torch. `torch.ops.pruneopd` is filled once both this package and torch are
imported, in either order. A copy that is on the path without being installed imports torch for that, if there is one.
"""

import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import host, parallel, reference
    from .budget import ResponseBudget
    from .config import PruneConfig
    from .drift import next_drift_count, sampled_drift
    from .errors import InvalidType, InvalidValue
    from .linear.linear_opd_loss import LinearOpdLoss, linear_opd_loss
    from .linear.linear_reliability import linear_reliability
    from .linear.linear_selected_logprobs import linear_selected_logprobs
    from .ops.opd_loss import OpdLoss, opd_loss
    from .ops.reliability import Reliability, reliability
    from .ops.reliability_from_drift import ReliabilityFromDrift, reliability_from_drift
    from .ops.reliability_from_topk import ReliabilityFromTopk, reliability_from_topk
    from .ops.reverse_kl import reverse_kl
    from .ops.selected_logprobs import SelectedLogprobs, selected_logprobs
    from .ops.token_stats import TokenStats, token_stats
    from .ops.topk_forward_kl import TopkForwardKl, topk_forward_kl
    from .ops.topk_policy_loss import topk_policy_loss
    from .rewards import OpdRewards, opd_rewards

__version__ = "0.1.0"

__all__ = [
    "InvalidType", "InvalidValue", "LinearOpdLoss", "OpdLoss", "OpdRewards", "PruneConfig", "Reliability",
    "ReliabilityFromDrift", "ReliabilityFromTopk", "ResponseBudget", "SelectedLogprobs", "TokenStats", "TopkForwardKl",
    "host", "linear_opd_loss", "linear_reliability", "linear_selected_logprobs", "next_drift_count", "opd_loss",
    "opd_rewards", "parallel", "reference", "reliability", "reliability_from_drift", "reliability_from_topk",
    "reverse_kl", "sampled_drift", "selected_logprobs", "token_stats", "topk_forward_kl", "topk_policy_loss",
]  # fmt: skip

# Where the other names are looked for. The first three import no torch.
_MODULES = ("ops", "config", "errors", "budget", "drift", "rewards", "linear")


def __getattr__(name: str) -> Any:
    if name in ("host", "parallel", "reference"):
        return import_module(f".{name}", __name__)
    if name in __all__:
        for module in _MODULES:
            value = getattr(import_module(f".{module}", __name__), name, None)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _torch_will_call() -> bool:
    """Return whether `import torch` will call `pruneopd_autoload`, as it does for an installed package."""
    return (
        __name__ == "pruneopd_kernels"
        and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"
        and bool(entry_points(group="torch.backends", name="pruneopd"))
    )


if sys.modules.get("torch") is not None or (find_spec("torch") is not None and not _torch_will_call()):
    import_module(".dispatch.registration", __name__)

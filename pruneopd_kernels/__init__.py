"""Operators for prune-aware on-policy distillation (Prune-OPD, arXiv:2605.07804).

The names below are resolved when they are first used: importing this package imports neither torch nor NumPy, and
`pruneopd_kernels.host` works where torch is not installed. `torch.ops.pruneopd` is filled as soon as both this package
and torch are imported, in whichever order.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _with_torch

if TYPE_CHECKING:
    from . import host, parallel, reference
    from .budget import ResponseBudget
    from .config import PruneConfig
    from .drift import next_drift_count, sampled_drift
    from .errors import InvalidType, InvalidValue
    from .linear.linear_opd_loss import linear_opd_loss
    from .linear.linear_reliability import linear_reliability
    from .ops.reliability import reliability
    from .ops.reliability_from_drift import reliability_from_drift
    from .ops.reliability_from_topk import reliability_from_topk
    from .ops.reverse_kl import reverse_kl
    from .ops.token_stats import token_stats
    from .ops.topk_forward_kl import topk_forward_kl
    from .ops.topk_policy_loss import topk_policy_loss
    from .results import (
        LinearOpdLoss,
        OpdRewards,
        Reliability,
        ReliabilityFromDrift,
        ReliabilityFromTopk,
        TokenStats,
        TopkForwardKl,
    )
    from .rewards import opd_rewards

__version__ = "0.1.0"

__all__ = [
    "InvalidType",
    "InvalidValue",
    "LinearOpdLoss",
    "OpdRewards",
    "PruneConfig",
    "Reliability",
    "ReliabilityFromDrift",
    "ReliabilityFromTopk",
    "ResponseBudget",
    "TokenStats",
    "TopkForwardKl",
    "host",
    "linear_opd_loss",
    "linear_reliability",
    "next_drift_count",
    "opd_rewards",
    "parallel",
    "reference",
    "reliability",
    "reliability_from_drift",
    "reliability_from_topk",
    "reverse_kl",
    "sampled_drift",
    "token_stats",
    "topk_forward_kl",
    "topk_policy_loss",
]

_MODULES = {
    "budget": ["ResponseBudget"],
    "config": ["PruneConfig"],
    "drift": ["next_drift_count", "sampled_drift"],
    "errors": ["InvalidType", "InvalidValue"],
    "linear": ["linear_opd_loss", "linear_reliability"],
    "ops": [
        "reliability",
        "reliability_from_drift",
        "reliability_from_topk",
        "reverse_kl",
        "token_stats",
        "topk_forward_kl",
        "topk_policy_loss",
    ],
    "results": [
        "LinearOpdLoss",
        "OpdRewards",
        "Reliability",
        "ReliabilityFromDrift",
        "ReliabilityFromTopk",
        "TokenStats",
        "TopkForwardKl",
    ],
    "rewards": ["opd_rewards"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("host", "parallel", "reference"):
        return import_module(f".{name}", __name__)
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_with_torch.register()

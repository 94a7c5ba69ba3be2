"""TRL's distillation trainers, with losses weighted by reliability and a response budget.

    from pruneopd_kernels.integrations.trl import PruneDistillationTrainer

takes the place of `trl.DistillationTrainer`, `PruneServerDistillationTrainer` that of
`trl.experimental.server_distillation.ServerDistillationTrainer`. Both rest on names that are private to TRL, so on
one minor version of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .._version import refuse_another_version

if TYPE_CHECKING:
    from .budget import BudgetCallback
    from .local import PruneDistillationTrainer
    from .server import PruneServerDistillationTrainer

__all__ = ["BudgetCallback", "PruneDistillationTrainer", "PruneServerDistillationTrainer"]

refuse_another_version(__name__, "trl", ">=1.16,<1.17")

_MODULE_OF = {
    "BudgetCallback": "budget",
    "PruneDistillationTrainer": "local",
    "PruneServerDistillationTrainer": "server",  # which warns that TRL calls its part of it experimental
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)

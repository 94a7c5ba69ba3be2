"""TRL's distillation trainers, with losses weighted by reliability and a response budget.

    from pruneopd_kernels.integrations.trl import PruneDistillationTrainer

`PruneDistillationTrainer` replaces `trl.DistillationTrainer`, and `PruneServerDistillationTrainer` replaces
`trl.experimental.server_distillation.ServerDistillationTrainer`. Both use private names of TRL, so they work with one
minor version of it.
"""

from typing import TYPE_CHECKING, Any

from .._version import refuse_another_version

refuse_another_version(__name__, "trl", ">=1.16,<1.17")

from .budget import BudgetCallback  # noqa: E402
from .local import PruneDistillationTrainer  # noqa: E402

if TYPE_CHECKING:
    from .server import PruneServerDistillationTrainer

__all__ = ["BudgetCallback", "PruneDistillationTrainer", "PruneServerDistillationTrainer"]


def __getattr__(name: str) -> Any:
    if name != "PruneServerDistillationTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .server import PruneServerDistillationTrainer  # TRL warns then that its base class is experimental

    return PruneServerDistillationTrainer

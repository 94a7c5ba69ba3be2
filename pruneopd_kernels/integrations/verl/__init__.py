"""verl's on-policy distillation with weights by reliability, a fused top-k loss and a response budget.

    distillation.distillation_loss._target_=pruneopd_kernels.integrations.verl.PruneLossConfig

Importing this package registers the distillation loss `prune_opd` with verl. Two of its modules act on import too,
because verl loads extensions by importing them: `.patched` calls `patch_verl`, and `.budget` registers a trainer and an
agent loop.
"""

from .._version import refuse_another_version

refuse_another_version(__name__, "verl", ">=0.9.1,<0.10")

from .loss import PruneLossConfig  # noqa: E402
from .patch import patch_verl  # noqa: E402

__all__ = ["PruneLossConfig", "patch_verl"]

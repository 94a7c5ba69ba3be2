"""verl's on-policy distillation with weights by reliability, a fused top-k loss and a response budget.

    distillation.distillation_loss._target_=pruneopd_kernels.integrations.verl.PruneLossConfig

Importing this registers the distillation loss `prune_opd` with verl. Two more modules act when they are imported, which
is how verl loads what is not its own: `.patched` calls `patch_verl`, `.budget` registers a trainer and an agent loop.
"""

from .._version import refuse_another_version

refuse_another_version(__name__, "verl", ">=0.9.1,<0.10")

from .loss import PruneLossConfig  # noqa: E402
from .patch import patch_verl  # noqa: E402

__all__ = ["PruneLossConfig", "patch_verl"]

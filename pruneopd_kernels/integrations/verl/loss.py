"""The distillation loss `prune_opd`: verl's top-k loss of each token, times the weight of its position.

verl computes the top-k loss inside the engine, where a rank may hold a part of the sequences, and gathers the values of
each token. The weights are computed after that, from whole responses, so they do not depend on how the work is split.
"""

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import (
    DistillationLossSettings,
    compute_forward_kl_topk,
    register_distillation_loss,
)
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig
from verl.workers.utils.padding import no_padding_2_padding

from ... import PruneConfig, checks, reliability_from_drift

LOSS_MODE = "prune_opd"


@dataclass
class PruneLossConfig(DistillationLossConfig):
    """verl's `DistillationLossConfig` for the loss `prune_opd`, with validated hyperparameters of pruning.

    As `distillation.distillation_loss._target_` it registers the loss in each process that reads verl's configuration.

    Args:
        loss_mode: `"prune_opd"`.
        topk: Candidates per position, k.
        use_task_rewards: False.
        use_policy_gradient: False.
        threshold: A position drifts if its overlap is below this, in (0, 1] (eq. 7).
        w_drop: Reliability lost with each drift, >= 0 (eq. 9).
        w_base: Added to the reliability to give the weight, >= 0 (eq. 10).
        eps: A position counts towards the effective length if its reliability exceeds this, >= 0 (eq. 12).

    Raises:
        ValueError: A value is outside of its range.
        TypeError: A value is of another type.
    """

    loss_mode: str = LOSS_MODE
    topk: int = PruneConfig.k
    use_task_rewards: bool = False
    use_policy_gradient: bool = False
    threshold: float = PruneConfig.threshold
    w_drop: float = PruneConfig.w_drop
    w_base: float = PruneConfig.w_base
    eps: float = PruneConfig.eps

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.loss_mode != LOSS_MODE:
            checks.bad_value(name, "loss_mode", f"be {LOSS_MODE}", self.loss_mode)
        distils_only(name, self)
        checks.kind(name, "topk", self.topk, "int")
        checks.at_least(name, "topk", self.topk, 1)
        for field in ("threshold", "w_drop", "w_base", "eps"):
            checks.kind(name, field, getattr(self, field), "float")
        checks.scalars(name, self)
        super().__post_init__()


@register_distillation_loss(  # type: ignore[untyped-decorator]
    DistillationLossSettings(names=[LOSS_MODE], use_topk=True)
)
def prune_opd(
    config: ActorConfig, distillation_config: DistillationConfig, model_output: dict[str, Tensor], data: TensorDict
) -> tuple[Tensor, dict[str, Any]]:
    """Return verl's loss `forward_kl_topk` times L (eq. 7-10), for verl to reduce with its own normaliser.

    A position of `response_mask` drifts if `overlap_count / topk < threshold`. verl applies `loss_max_clamp` to the
    weighted loss. With verl's own configuration the hyperparameters are the defaults of `PruneLossConfig`. verl passes
    the arguments: `model_output` has the engine's values for each token of the micro-batch `data`.

    Returns:
        The losses `[B, T]`, and metrics: those of verl's loss, `distillation/drift_rate`, `distillation/weight`, and
        `distillation/effective_length`, a list of each response's E (eq. 12), whose mean verl logs. Responses without a
        valid position, which verl adds to fill a batch, are left out.

    Raises:
        ValueError: `use_fused_kernels`, `use_task_rewards` or `use_policy_gradient` is set.
    """
    loss_config = distillation_config.distillation_loss
    distils_only(LOSS_MODE, loss_config)
    if get_non_tensor_data(data, "use_fused_kernels", False):
        checks.bad_value(LOSS_MODE, "use_fused_kernels", "be False (verl's fused kernels count no overlap)", True)
    losses, metrics = compute_forward_kl_topk(config, distillation_config, model_output, data)

    prune = loss_config if isinstance(loss_config, PruneLossConfig) else PruneConfig()
    mask = data["response_mask"]
    valid = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
    overlap_count = no_padding_2_padding(model_output["overlap_count"], data)
    drift = overlap_count.double() / loss_config.topk < prune.threshold
    trust = reliability_from_drift(drift, valid, w_drop=prune.w_drop, w_base=prune.w_base, eps=prune.eps)
    metrics["distillation/drift_rate"] = drift[valid].float().mean().item()
    metrics["distillation/weight"] = trust.weight[valid].mean().item()
    metrics["distillation/effective_length"] = trust.effective_length[valid.any(-1)].tolist()
    return losses * trust.weight, metrics


def distils_only(name: str, loss_config: DistillationLossConfig) -> None:
    """Raise ValueError if the gradient has other terms than the distillation loss."""
    for field in ("use_task_rewards", "use_policy_gradient"):
        if getattr(loss_config, field):
            checks.bad_value(name, field, "be False", True)

"""`topk_forward_kl` in place of verl's function of the same loss, which writes a log-softmax of all logits."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from verl.trainer.distillation.fsdp import losses as fsdp_losses
from verl.utils.import_utils import is_megatron_core_available
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.config import DistillationConfig

from ... import TopkForwardKl, parallel, topk_forward_kl
from .loss import distils_only


def patch_verl() -> None:
    """Replace verl's `compute_forward_kl_topk` in this process, for FSDP, and for Megatron if it is installed.

    It serves the losses `forward_kl_topk` and `prune_opd`. The results equal verl's up to rounding: verl computes in
    the logits' dtype, or in autocast's, and this in float32. If candidates tie for the last place of the top-k, the
    overlap may differ. For Megatron the masses are those before `log_prob_min_clamp`, as for FSDP; Megatron's own are
    those after it.

    The replacement raises ValueError if `use_task_rewards` or `use_policy_gradient` is set. verl then also computes a
    policy loss, which overwrites the logits, and the backward pass needs to read them again.
    """
    fsdp_losses.compute_forward_kl_topk = _with(_fsdp_part, topk_forward_kl)
    if is_megatron_core_available():
        from verl.trainer.distillation.megatron import losses as megatron_losses

        megatron_losses.compute_forward_kl_topk = _with(_megatron_part, _megatron_loss)


def _with(part: Callable[[Tensor, str], Tensor], loss: Callable[..., TopkForwardKl]) -> Callable[..., Any]:
    """Return a replacement; `part` takes this rank's candidates `[1, N, k]` out of all, nested `[B, T, k]`."""

    def compute_forward_kl_topk(
        student_logits: Tensor,
        teacher_topk_log_probs: Tensor,
        teacher_topk_ids: Tensor,
        config: DistillationConfig,
        data_format: str,
    ) -> dict[str, Tensor]:
        settings = config.distillation_loss
        distils_only("patch_verl", settings)
        ids, logprobs = (part(x, data_format) for x in (teacher_topk_ids, teacher_topk_log_probs))
        # Where there is no next token verl fills with one id, k times: no logits are read there.
        token = (ids != ids[..., :1]).any(-1) | (ids.shape[-1] == 1)
        out = loss(student_logits, ids, logprobs, token, tail="none", logprob_min=settings.log_prob_min_clamp)
        return {
            "distillation_losses": out.loss,
            "student_mass": out.student_mass,
            "teacher_mass": out.teacher_mass,
            "overlap_count": (out.overlap * ids.shape[-1]).round().long(),
            "overlap_token_advantage": out.overlap_token_advantage,
        }

    return compute_forward_kl_topk


def _fsdp_part(nested: Tensor, data_format: str) -> Tensor:
    packed = nested.values().unsqueeze(0)
    parallel_ranks: int = get_ulysses_sequence_parallel_world_size()
    return slice_input_tensor(packed, dim=1) if parallel_ranks > 1 else packed


def _megatron_part(nested: Tensor, data_format: str) -> Tensor:
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    part_of = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    return part_of(nested, pre_process=True)[0]  # type: ignore[no-any-return]


def _megatron_loss(*arguments: Tensor, **options: Any) -> TopkForwardKl:
    """Compute the loss from this rank's slice of the vocabulary."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return parallel.topk_forward_kl(*arguments, group=get_tensor_model_parallel_group(), **options)

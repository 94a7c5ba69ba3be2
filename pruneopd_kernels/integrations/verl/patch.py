"""`topk_forward_kl` in the place of verl's function of the same loss, which writes a log-softmax of all logits."""

from __future__ import annotations

from torch import Tensor
from verl.trainer.distillation.fsdp import losses as fsdp_losses
from verl.utils.import_utils import is_megatron_core_available
from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
from verl.workers.config import DistillationConfig

from ... import TopkForwardKl, parallel
from ...ops.topk_forward_kl import topk_forward_kl
from .loss import distils_only


def patch_verl() -> None:
    """Replace verl's `compute_forward_kl_topk` in this process, for FSDP, and for Megatron where that is installed.

    For the losses `forward_kl_topk` and `prune_opd`. What it returns is the same but for rounding: verl computes in the
    logits' dtype, or in what autocast makes of it, this in float32. Where candidates tie for the last place of the
    top-k, the overlap may differ.
    For Megatron the masses are those before `log_prob_min_clamp`, as for FSDP; Megatron's own are those after.

    What is put there raises ValueError where `use_task_rewards` or `use_policy_gradient` is set: verl then computes a
    policy loss too, which overwrites the logits on its way, and here they are read again in the backward pass.
    """
    fsdp_losses.compute_forward_kl_topk = _of_fsdp
    if is_megatron_core_available():
        from verl.trainer.distillation.megatron import losses as megatron_losses

        megatron_losses.compute_forward_kl_topk = _of_megatron


def _of_fsdp(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: DistillationConfig,
    data_format: str,
) -> dict[str, Tensor]:
    """Logits of a rank's part of the packed sequences, `[1, N, V]`; the teacher's top-k of all, nested `[B, T, k]`."""
    distils_only("patch_verl", config.distillation_loss)
    ids, logprobs = (x.values().unsqueeze(0) for x in (teacher_topk_ids, teacher_topk_log_probs))
    if get_ulysses_sequence_parallel_world_size() > 1:
        ids, logprobs = (slice_input_tensor(x, dim=1) for x in (ids, logprobs))
    logprob_min = config.distillation_loss.log_prob_min_clamp
    return _outputs(topk_forward_kl(student_logits, ids, logprobs, logprob_min=logprob_min), ids.shape[-1])


def _of_megatron(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: DistillationConfig,
    data_format: str,
) -> dict[str, Tensor]:
    """The same, with `[1, N, V_r]`: this rank's slice of the vocabulary."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

    distils_only("patch_verl", config.distillation_loss)
    part_of = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    ids, logprobs = (part_of(x, pre_process=True)[0] for x in (teacher_topk_ids, teacher_topk_log_probs))
    logprob_min = config.distillation_loss.log_prob_min_clamp
    group = get_tensor_model_parallel_group()
    out = parallel.topk_forward_kl(student_logits, ids, logprobs, logprob_min=logprob_min, group=group)
    return _outputs(out, ids.shape[-1])


def _outputs(out: TopkForwardKl, k: int) -> dict[str, Tensor]:
    return {
        "distillation_losses": out.loss,
        "student_mass": out.student_mass,
        "teacher_mass": out.teacher_mass,
        "overlap_count": (out.overlap * k).round().long(),
        "overlap_token_advantage": out.overlap_token_advantage,
    }

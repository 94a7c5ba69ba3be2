"""What each rank does in the tests with two processes. Ranks import this module, not the tests."""

import contextlib
import types
import warnings
from unittest import mock

import torch
from torch import distributed as dist


def losses():
    """Return the modules of verl in which a function is replaced."""
    warnings.simplefilter("ignore")  # verl's own, of engines that are not installed
    from verl.trainer.distillation.fsdp import losses as fsdp_losses
    from verl.trainer.distillation.megatron import losses as megatron_losses

    return fsdp_losses, megatron_losses


@contextlib.contextmanager
def patched():
    from pruneopd_kernels.integrations.verl import patch_verl

    with contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(mock.patch.object(module, "compute_forward_kl_topk")) for module in losses()]
        patch_verl()
        assert all(module.compute_forward_kl_topk is not stub for module, stub in zip(losses(), stubs, strict=True))
        yield


def step_of_a_sequence_part(group, settings, sp_size, replaced):
    """Run the step of `verl_cases` under Ulysses sequence parallelism; return what this rank gets."""
    losses()
    with patched() if replaced else contextlib.nullcontext():
        import verl_cases
        from verl.utils.ulysses import set_ulysses_sequence_parallel_group

        set_ulysses_sequence_parallel_group(dist.group.WORLD)
        try:
            return verl_cases.step(verl_cases.pruned(**settings), verl_cases.micro_batch(), sp_size)
        finally:
            set_ulysses_sequence_parallel_group(None)


def loss_of_a_vocabulary_slice(group, inputs, data_format, clamp):
    """Return the outputs of `compute_forward_kl_topk` under tensor parallelism: verl's and the replacement's."""
    _, megatron_losses = losses()
    import verl_cases
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
    from verl.workers.config import DistillationConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    *conversations, upstream = (verl_cases.nested(x) for x in inputs)
    pack = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    whole, upstream = (pack(x, pre_process=True)[0] for x in (conversations[0], upstream))
    token = pack(verl_cases.nested(torch.ones(len(x)) for x in inputs[0]), pre_process=True)[0].bool()
    logits = whole.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous().requires_grad_()
    config = DistillationConfig(distillation_loss=verl_cases.stock(log_prob_min_clamp=clamp))

    def outputs():
        _, ids, logprobs = conversations
        found = megatron_losses.compute_forward_kl_topk(logits.clone(), logprobs, ids, config, data_format)
        (gradient,) = torch.autograd.grad(found["distillation_losses"], logits, upstream)
        assert not gradient[~token].any()
        return {name: tensor.detach()[token] for name, tensor in {**found, "gradient": gradient}.items()}

    own = outputs()
    with patched():
        return own, outputs()


def metrics_of_an_update(group, settings):
    """Return what verl's worker reports after two mini-batches of two micro-batches each."""
    losses()
    import verl_cases
    from verl.utils import tensordict_utils
    from verl.utils.profiler import DistProfiler, DistProfilerExtension
    from verl.workers.engine_workers import TrainingWorker

    worker = object.__new__(TrainingWorker)
    worker.engine = verl_cases.Engine(dp_group=dist.group.WORLD)
    worker.loss_fn = verl_cases.loss_function_of(verl_cases.pruned(**settings))
    worker.model_config, worker.flops_counter, worker.device_name = {"use_remove_padding": True}, None, "cpu"
    worker.engine_config = types.SimpleNamespace(
        forward_only=False, use_dynamic_bsz=False, max_token_len_per_gpu=None, micro_batch_size_per_gpu=2,
        use_fused_kernels=False,
    )  # fmt: skip
    DistProfilerExtension.__init__(worker, DistProfiler(rank=dist.get_rank()))
    batches = [verl_cases.micro_batch(holes=dist.get_rank() == 0) for _ in range(2)]
    batch = tensordict_utils.concat_tensordict(batches)
    tensordict_utils.assign_non_tensor(batch, mini_batch_size=8, epochs=1)  # 4 a rank
    return worker.train_mini_batch(batch)["metrics"]

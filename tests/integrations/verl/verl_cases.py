"""Inputs of verl's engines and losses: small micro-batches, configurations, a tiny model."""

import contextlib
import types
from functools import partial

import torch
from tensordict import TensorDict
from torch import distributed as dist
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig
from verl.workers.engine.fsdp import transformer_impl

from pruneopd_kernels.integrations.verl import PruneLossConfig

K, VOCABULARY, HIDDEN = 8, 64, 16
PROMPTS, RESPONSES = (3, 2, 4, 1), (9, 4, 12, 2)  # 37 tokens: not divisible by two
transformer_impl.get_device_id = lambda: "cpu"  # verl's own devices are those of its platforms, which are all GPUs
DISTILS_ONLY = {"use_task_rewards": False, "use_policy_gradient": False}


def stock(**settings):
    """Return verl's configuration of its own top-k loss."""
    return DistillationLossConfig(**{"loss_mode": "forward_kl_topk", "topk": K, **DISTILS_ONLY, **settings})


def pruned(**settings):
    return PruneLossConfig(**{"topk": K, **settings})


def actor(**settings):
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=4, **settings)


def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


class Model(torch.nn.Module):
    """Compute logits from each token alone, so any part of a sequence can be computed separately."""

    config = None  # verl looks whether it sees images

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=random))
        self.head = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=random) / HIDDEN**0.5)

    def forward(self, input_ids, **_):
        return types.SimpleNamespace(logits=3 * self.embedding[input_ids].tanh() @ self.head.T)


class Engine(transformer_impl.FSDPEngineWithLMHead):
    """verl's engine around that model, without FSDP: its layouts, micro-batches, gather and calls of the loss."""

    def __init__(self, sp_size=1, dp_group=None):
        self.module = Model()
        self.pad_to_length = self._qat_enabled = False
        self.use_ulysses_sp, self.ulysses_sequence_parallel_size = sp_size > 1, sp_size
        self._autocast_dtype = torch.float32
        self.dp_group, self.engine_config = dp_group, None
        self.optimizer = torch.optim.SGD(self.module.parameters())
        self.optimizer_config = types.SimpleNamespace(clip_grad=1.0)

    def get_data_parallel_group(self):
        return self.dp_group

    def get_data_parallel_size(self):
        return dist.get_world_size(self.dp_group)

    def get_data_parallel_rank(self):
        return dist.get_rank(self.dp_group)

    def is_mp_src_rank_with_outputs(self):
        return True

    def train_mode(self, **_):
        return contextlib.nullcontext()

    def lr_scheduler_step(self):
        return 1e-6


def micro_batch(*, holes=True, remove_padding=True):
    """Return four conversations without padding, as verl's trainer passes them to the engine."""
    random = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCABULARY, (p + r,), generator=random) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    logits = [Model()(row).logits.detach() for row in tokens]
    teacher = [(x + torch.randn(x.shape, generator=random)).log_softmax(-1).topk(K) for x in logits]
    for top in teacher:
        top.indices[-1] = top.values[-1] = 0  # what verl's servers fill in behind the last token
    masks = [torch.ones(r, dtype=torch.int64) for r in RESPONSES]
    if holes:
        masks[0][3:5] = masks[2][:1] = 0  # as what a tool said
        masks[3][:] = 0  # as one that verl adds to fill a batch
    batch = TensorDict(
        {
            "input_ids": nested(tokens),
            "position_ids": nested(torch.arange(len(row)) for row in tokens),
            "prompts": nested(row[:p] for row, p in zip(tokens, PROMPTS, strict=True)),
            "responses": nested(row[p:] for row, p in zip(tokens, PROMPTS, strict=True)),
            "response_mask": nested(masks),
            "loss_mask": nested(masks),
            "teacher_ids": nested(top.indices.int() for top in teacher),
            "teacher_logprobs": nested(top.values for top in teacher),
        },
        batch_size=len(tokens),
    )
    return tensordict_utils.assign_non_tensor(
        batch, temperature=1.0, use_remove_padding=remove_padding, distillation_use_topk=True, distillation_only=True,
        dp_size=1, batch_num_tokens=int(sum(mask.sum() for mask in masks)), global_batch_size=len(tokens),
    )  # fmt: skip


def loss_function_of(loss_config, **actor_settings):
    """Return the loss function that verl's workers pass to the engine."""
    distillation = DistillationConfig(distillation_loss=loss_config)
    return partial(distillation_ppo_loss, config=actor(**actor_settings), distillation_config=distillation)


def step(loss_config, batch, sp_size=1, **actor_settings):
    """Run both passes through verl's engine; return the loss, its metrics and the model's gradients."""
    engine = Engine(sp_size)
    loss, output = engine.forward_step(batch, loss_function_of(loss_config, **actor_settings), forward_only=False)
    loss.backward()
    metrics = {name: getattr(value, "values", value) for name, value in output["metrics"].items()}
    return loss.detach(), metrics, [parameter.grad for parameter in engine.module.parameters()]

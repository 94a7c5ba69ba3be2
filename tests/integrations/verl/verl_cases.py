"""What verl's engines and losses are given: small micro-batches in its layouts, its configurations, a tiny model."""

import types
from functools import partial

import torch
from tensordict import TensorDict
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from pruneopd_kernels.integrations.verl import PruneLossConfig

K, VOCABULARY, HIDDEN = 8, 64, 16
PROMPTS, RESPONSES = (3, 2, 4, 1), (9, 4, 12, 2)  # 37 tokens: not divisible by two
DISTILS_ONLY = {"use_task_rewards": False, "use_policy_gradient": False}


def stock(**settings):
    """verl's own configuration of its top-k loss."""
    return DistillationLossConfig(**{"loss_mode": "forward_kl_topk", "topk": K, **DISTILS_ONLY, **settings})


def pruned(**settings):
    return PruneLossConfig(**{"topk": K, **settings})


def actor(**settings):
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=4, **settings)


def nested(rows):
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


class Model(torch.nn.Module):
    """Logits of each token by itself, so that any part of a sequence can be computed alone."""

    config = None  # verl looks whether it sees images

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=random))
        self.head = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=random) / HIDDEN**0.5)

    def forward(self, input_ids, **_):
        return types.SimpleNamespace(logits=3 * self.embedding[input_ids].tanh() @ self.head.T)


class Engine(FSDPEngineWithLMHead):
    """verl's engine around that model, on the CPU and without FSDP: its layouts, its gather, its calls of the loss."""

    def __init__(self, sp_size=1):
        self.module = Model()
        self.pad_to_length = False
        self.use_ulysses_sp, self.ulysses_sequence_parallel_size = sp_size > 1, sp_size

    def forward_step(self, batch, loss_function, forward_only=False):
        """As the original, which moves the batch to a GPU first."""
        inputs, arguments = self.prepare_model_inputs(batch)
        output = self.prepare_model_outputs(self.module(**inputs), arguments, batch, loss_function)
        return loss_function(model_output=output, data=batch, dp_group=None)


def micro_batch(noise=1.0, *, holes=True, remove_padding=True, k=K):
    """Four conversations without padding, as verl's trainer hands them to the engine."""
    random = torch.Generator().manual_seed(0)
    tokens = [torch.randint(VOCABULARY, (p + r,), generator=random) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    teacher = []
    for row in tokens:
        logits = Model()(row).logits.detach()
        logits = logits + noise * torch.randn(logits.shape, generator=random)
        teacher.append(logits.log_softmax(-1).topk(k))
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
            "teacher_ids": nested(top.indices.int() for top in teacher),
            "teacher_logprobs": nested(top.values for top in teacher),
        },
        batch_size=len(tokens),
    )
    settings = {
        "temperature": 1.0,
        "use_remove_padding": remove_padding,
        "distillation_use_topk": True,
        "distillation_only": True,
        "dp_size": 1,
        "batch_num_tokens": int(sum(mask.sum() for mask in masks)),
        "global_batch_size": len(tokens),
    }
    return tensordict_utils.assign_non_tensor(batch, **settings)


def step(loss_config, batch, sp_size=1, **actor_settings):
    """One forward and backward pass through verl's engine: the loss, its metrics, the model's gradients."""
    engine = Engine(sp_size)
    distillation = DistillationConfig(distillation_loss=loss_config)
    loss_function = partial(distillation_ppo_loss, config=actor(**actor_settings), distillation_config=distillation)
    loss, metrics = engine.forward_step(batch, loss_function)
    loss.backward()
    metrics = {name: getattr(value, "values", value) for name, value in metrics.items()}
    return loss.detach(), metrics, [parameter.grad for parameter in engine.module.parameters()]

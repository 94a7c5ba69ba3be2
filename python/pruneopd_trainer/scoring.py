"""What both models say of every token of a batch of responses: drift, reliability, rewards and their weight.

This is where the operators of `pruneopd_kernels` are called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pruneopd_kernels as po

from .config import Metric, TrainConfig
from .rollouts import Rollouts

METRICS: tuple[Metric, ...] = ("overlap", "top_p")


class Scores(NamedTuple):
    """Of B responses of up to T tokens, with m candidates a position; 0 where masked, and constant to the gradient."""

    mask: Tensor  # [B, T] bool: True at a response's tokens
    overlap: Tensor  # [B, T] float32 (eq. 6)
    drift: Tensor  # [B, T] bool (eq. 7, or eq. 16 with metric="top_p")
    accepted: Tensor  # [B, T] bool: whether the sampled token is in the teacher's nucleus (eq. 15)
    reliability: Tensor  # [B, T] float32 (eq. 9)
    weight: Tensor  # [B, T] float32 (eq. 10)
    effective_length: Tensor  # [B] int32 (eq. 12)
    candidates: Tensor  # [B, T, m] int64: the token ids that are rewarded
    rewards: Tensor  # [B, T, m] float32: rewards without a weight, r in eq. 11
    reverse_kl: Tensor  # [B, T] float32: KL(student || teacher), in nats
    entropy_gap: Tensor  # [B, T] float32: the student's entropy less the teacher's, in nats


def response_logits(model: nn.Module, rollouts: Rollouts) -> Tensor:
    """Return `[B, T, V]`: the logits from which each token of the responses was drawn."""
    length = rollouts.token_ids.shape[1] - rollouts.prompt_length
    output: Any = model(
        input_ids=rollouts.token_ids,
        attention_mask=rollouts.attention_mask,
        position_ids=rollouts.position_ids,
        use_cache=False,
        logits_to_keep=length + 1,
    )
    logits: Tensor = output.logits[:, :-1]
    return logits


@torch.no_grad()
def teacher_logits(teacher: PreTrainedModel, rollouts: Rollouts, device: torch.device) -> Tensor:
    """Return the teacher's `[B, T, V]`, computed on the teacher's device and moved to `device`."""
    token_ids, attention_mask, prompt_length = rollouts
    there = Rollouts(token_ids.to(teacher.device), attention_mask.to(teacher.device), prompt_length)
    return response_logits(teacher, there).to(device)


@torch.no_grad()
def score(
    student_logits: Tensor, teacher_logits: Tensor, rollouts: Rollouts, config: TrainConfig, vocab_size: int
) -> Scores:
    """Score every token (lines 4 to 9 of Algorithm 1) in one read of both models' logits.

    Args:
        student_logits: `[B, T, V]`; may require a gradient, none flows.
        teacher_logits: `[B, T, V']`.
        rollouts: The B responses of T tokens.
        config: k, threshold, w_drop, w_base, eps, metric, top_p, strategy, reward_weight, temperature.
        vocab_size: Ids from here on are ignored: they pad a head.
    """
    mask, token_ids = rollouts.mask, rollouts.response_ids
    stats = po.token_stats(
        student_logits,
        teacher_logits,
        mask,
        token_ids=token_ids,
        k=min(config.k, vocab_size),
        student_temperature=config.temperature,
        teacher_temperature=config.temperature,
        vocab_size=vocab_size,
    )
    along = {
        metric: po.reliability_from_topk(
            stats.student_topk_ids,
            stats.teacher_topk_ids,
            mask,
            teacher_topk_logprobs=stats.teacher_topk_logprobs,
            token_ids=token_ids,
            threshold=config.threshold,
            w_drop=config.w_drop,
            w_base=config.w_base,
            eps=config.eps,
            metric=metric,
            top_p=config.top_p,
        )
        for metric in METRICS
    }
    candidates, rewards, _ = po.opd_rewards(
        *stats[:6], mask, strategy=config.strategy, reward_weight=config.reward_weight
    )
    return Scores(
        mask=mask,
        overlap=stats.overlap,
        drift=along[config.metric].drift,
        accepted=mask & ~along["top_p"].drift,
        reliability=along[config.metric].reliability,
        weight=along[config.metric].weight,
        effective_length=along[config.metric].effective_length,
        candidates=candidates,
        rewards=rewards,
        reverse_kl=stats.reverse_kl,
        entropy_gap=stats.student_entropy - stats.teacher_entropy,
    )

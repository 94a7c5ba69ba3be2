"""What both models say of every token of a batch of responses: drift, reliability, rewards and their weight.

This is where the operators of `pruneopd_kernels` are called.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

import pruneopd_kernels as po

from .config import TrainConfig
from .rollouts import Rollouts


class Scores(NamedTuple):
    """Of B responses of up to T tokens, with m candidates a position; 0 where masked. Only `loss` has a gradient."""

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
    entropy_gap: Tensor  # [B, T] float32: between the student's entropy and the teacher's, in nats (eq. 4)
    loss: Tensor | None = None  # [B, T] float32: -sum(rewards), if the candidates are the student's own; else None


def response_logits(model: nn.Module, rollouts: Rollouts) -> Tensor:
    """Return `[B, T, V]`: the logits from which each token of the responses was drawn."""
    length = rollouts.token_ids.shape[1] - rollouts.prompt_length
    logits: Tensor = model(**rollouts.inputs, use_cache=False, logits_to_keep=length + 1).logits
    return logits[:, :-1]


def score(
    student_logits: Tensor, teacher_logits: Tensor, rollouts: Rollouts, config: TrainConfig, vocab_size: int
) -> Scores:
    """Score every token (lines 4 to 9 of Algorithm 1) in one read of the logits, `[B, T, V]` and `[B, T, V']`.

    Ids from `vocab_size` on are ignored: they pad a head.
    """
    mask, prune = rollouts.mask, replace(config.prune, k=min(config.k, vocab_size))
    how: Any = {f"{side}_temperature": config.temperature for side in ("student", "teacher")}
    how |= {"token_ids": rollouts.response_ids, "vocab_size": vocab_size}
    if config.strategy == "student":
        how |= {"weight": mask.float(), "entropies": True}
        out = po.opd_loss(student_logits, teacher_logits, mask, **asdict(prune), **how)
        found = out._asdict() | {"candidates": out.topk_ids}
    else:
        stats = po.token_stats(student_logits, teacher_logits, mask, k=prune.k, **how)
        along, accepted = follow(stats, rollouts, prune)
        ids, rewards, _ = po.opd_rewards(*stats[:6], mask, strategy=config.strategy, reward_weight=prune.reward_weight)
        others = {"accepted": accepted, "candidates": ids, "rewards": rewards, "loss": None}
        found = stats._asdict() | along._asdict() | others
    gap = (found["student_entropy"] - found["teacher_entropy"]).abs()
    return Scores._make({**found, "mask": mask, "entropy_gap": gap}[name] for name in Scores._fields)


def follow(stats: po.TokenStats, rollouts: Rollouts, config: po.PruneConfig) -> tuple[po.ReliabilityFromTopk, Tensor]:
    """Return eq. 6 to 12 along the responses, and `[B, T]` bool: is a token in the teacher's nucleus (eq. 15)?"""
    given: Any = {name: getattr(config, name) for name in ("threshold", "w_drop", "w_base", "eps", "top_p")}
    given |= {"teacher_topk_logprobs": stats.teacher_topk_logprobs, "token_ids": rollouts.response_ids}
    ids = stats.student_topk_ids, stats.teacher_topk_ids
    found = po.reliability_from_topk(*ids, rollouts.mask, metric=config.metric, **given)
    top_p = po.reliability_from_topk(*ids, rollouts.mask, metric="top_p", **given)
    return found, rollouts.mask & ~top_p.drift

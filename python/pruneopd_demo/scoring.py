"""Scores responses with the fused operators, and with eager PyTorch on the same logits, to compare and to time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_kernels import PruneConfig, Reliability, next_drift_count, reliability
from pruneopd_kernels.ops import _cpp
from pruneopd_kernels.ops._implementations import AUTO

from .problems import DemoError
from .rollouts import Rollouts, position_ids

CHUNK = 32
"""Positions of each response whose logits are alive at a time: 12 x 32 rows of 49152 floats are 75 MB a model."""
TOLERANCE = 1e-4
"""The largest difference that float32 explains in a reward: both sides subtract log-probabilities of 10 to 30 nats."""


class Scores(NamedTuple):
    """What the operators say of B responses of T tokens, and how eager PyTorch compared."""

    mask: Tensor
    """`[B, T]` bool: True at a response's tokens."""
    overlap: Tensor
    """`[B, T]` float32, 0 where masked, as the others."""
    drift: Tensor
    """`[B, T]` bool."""
    weight: Tensor
    """`[B, T]` float32."""
    effective_length: Tensor
    """`[B]` int32."""
    operator_s: float
    eager_s: float
    compared: int
    """Positions at which eager PyTorch was held to the operators."""
    reward_error: float
    """The largest difference of a position's reward among them."""


def implementation() -> str:
    """The implementation that scores here, such as `cpp (avx2)`."""
    return f"cpp ({_cpp.instruction_set()})" if AUTO["cpu"] == "cpp" else AUTO["cpu"]


@torch.no_grad()
def hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """`[B, T, H]`: the states from which the model predicts each token of the responses."""
    states: Tensor = model.base_model(
        input_ids=rollouts.token_ids,
        attention_mask=rollouts.attention_mask,
        position_ids=position_ids(rollouts.attention_mask),
        use_cache=False,
    ).last_hidden_state
    return states[:, rollouts.prompt_length - 1 : -1]


@torch.no_grad()
def logit_chunks(model: PreTrainedModel, states: Tensor) -> Iterator[Tensor]:
    """The logits `[B, at most CHUNK, V]` of consecutive positions."""
    untyped: Any = model
    head = untyped.get_output_embeddings()
    for chunk in states.split(CHUNK, dim=1):
        yield head(chunk)


def score(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rollouts: Rollouts,
    config: PruneConfig,
    on_chunk: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores every token of the responses, in chunks along them with the drift count carried.

    Args:
        student: The model that sampled the responses.
        teacher: The model that it is compared with.
        rollouts: The responses.
        config: The operator's hyperparameters.
        on_chunk: Called after every CHUNK positions.

    Returns:
        The scores, and the time that the operator and eager PyTorch took for them, models not included.

    Raises:
        DemoError: Eager PyTorch gives other numbers.
    """
    masks = rollouts.mask.split(CHUNK, dim=1)
    students = logit_chunks(student, hidden_states(student, rollouts))
    teachers = logit_chunks(teacher, hidden_states(teacher, rollouts))
    carry = eager_carry = torch.zeros(len(rollouts.token_ids), dtype=torch.int32)
    untied = torch.ones(len(carry), dtype=torch.bool)
    chunks: list[Reliability] = []
    operator_s, eager_s, compared, reward_error = 0.0, 0.0, 0, 0.0

    for student_logits, teacher_logits, mask in zip(students, teachers, masks, strict=True):
        if not chunks:  # the first calls pay for loading and warming up
            reliability(student_logits[:1, :1], teacher_logits[:1, :1], **asdict(config))
            eager_reliability(student_logits[:1, :1], teacher_logits[:1, :1], mask[:1, :1], carry[:1], config)

        start = time.perf_counter()
        scored = reliability(student_logits, teacher_logits, mask, drift_count=carry, **asdict(config))
        operator_s += time.perf_counter() - start

        start = time.perf_counter()
        eager = eager_reliability(student_logits, teacher_logits, mask, eager_carry, config)
        eager_s += time.perf_counter() - start

        # Where the k-th and the next logit are equal, torch.topk takes either, and all that follows may differ.
        tied = ties(student_logits, config.k) | ties(teacher_logits, config.k)
        held = untied[:, None] & (tied & mask).cumsum(1).eq(0)
        untied, held = held[:, -1], held & mask
        reward_error = max(reward_error, largest_difference(scored.rewards.sum(-1), eager.rewards.sum(-1), held))
        if largest_difference(scored.overlap, eager.overlap, held) or reward_error > TOLERANCE:
            raise DemoError(f"the operators and eager PyTorch disagree: rewards differ by {reward_error:.2g}")
        if largest_difference(scored.weight, eager.weight, held) > 1e-6:
            raise DemoError("the operators and eager PyTorch disagree about the weights")
        compared += int(held.sum())

        carry, eager_carry = next_drift_count(scored.drift_count), eager.drift_count
        chunks.append(scored)
        on_chunk()

    return Scores(
        rollouts.mask,
        torch.cat([chunk.overlap for chunk in chunks], dim=1),
        torch.cat([chunk.drift for chunk in chunks], dim=1),
        torch.cat([chunk.weight for chunk in chunks], dim=1),
        torch.stack([chunk.effective_length for chunk in chunks]).sum(0),
        operator_s,
        eager_s,
        compared,
        reward_error,
    )


class EagerReliability(NamedTuple):
    """The part of `Reliability` that is compared, and the drift count after the last position, `[B]`."""

    overlap: Tensor
    weight: Tensor
    rewards: Tensor
    drift_count: Tensor


@torch.no_grad()
def eager_reliability(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, drift_count: Tensor, config: PruneConfig
) -> EagerReliability:
    """What one writes in plain PyTorch for Prune-OPD (arXiv:2605.07804), eq. 6-11: the peer that is timed."""
    student_ids = student_logits.topk(config.k).indices
    teacher_ids = teacher_logits.topk(config.k).indices
    shared = (student_ids[..., :, None] == teacher_ids[..., None, :]).any(-1)
    overlap = shared.float().mean(-1) * mask

    drift = (overlap < config.threshold) & mask
    count = drift_count[:, None] + drift.cumsum(1)
    weight = ((1 - config.w_drop * count.double()).clamp(0, 1) + config.w_base).float() * mask

    student_logprobs = student_logits.log_softmax(-1).gather(-1, student_ids)
    teacher_logprobs = teacher_logits.log_softmax(-1).gather(-1, student_ids)
    rewards = weight[..., None] * student_logprobs.softmax(-1) * (teacher_logprobs - student_logprobs)
    return EagerReliability(overlap, weight, rewards, count[:, -1].int())


def ties(logits: Tensor, k: int) -> Tensor:
    """Whether the k-th largest logit of a row equals the next one."""
    values = logits.topk(k + 1).values
    return values[..., k - 1] == values[..., k]


def largest_difference(x: Tensor, y: Tensor, held: Tensor) -> float:
    """The largest absolute difference where `held`; 0 where nothing is."""
    return float((x - y)[held].abs().max()) if held.any() else 0.0

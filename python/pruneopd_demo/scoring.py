"""Scores responses with the fused operators, and with eager PyTorch on the same logits, to compare and to time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_kernels import PruneConfig, Reliability, next_drift_count, reliability
from pruneopd_kernels.dispatch import cpp
from pruneopd_kernels.dispatch.implementations import AUTO
from pruneopd_trainer.chunks import hidden_states
from pruneopd_trainer.rollouts import Rollouts

from .eager import Agreement, eager_reliability, ties

CHUNK = 32
"""Positions of each response whose logits are alive at a time: 12 x 32 rows of 49152 floats are 75 MB a model."""


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
    positions_compared: int
    """Positions at which eager PyTorch was held to the operators."""
    reward_difference: float
    """The largest difference of a position's reward among them."""


def implementation() -> str:
    """The implementation that scores here, such as `cpp (avx2)`."""
    return f"cpp ({cpp.instruction_set()})" if AUTO["cpu"][0] == "cpp" else AUTO["cpu"][0]


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
    chunks: list[Reliability] = []
    operator_s = eager_s = 0.0
    carry = eager_carry = torch.zeros(len(rollouts.token_ids), dtype=torch.int32)
    agreement = Agreement(untied=torch.ones(len(carry), dtype=torch.bool))

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

        tied = ties(student_logits, config.k) | ties(teacher_logits, config.k)
        agreement.check(scored, eager, tied, mask)
        carry, eager_carry = next_drift_count(scored.drift_count), eager.drift_count[:, -1]
        chunks.append(scored)
        on_chunk()

    return Scores(
        mask=rollouts.mask,
        overlap=torch.cat([chunk.overlap for chunk in chunks], dim=1),
        drift=torch.cat([chunk.drift for chunk in chunks], dim=1),
        weight=torch.cat([chunk.weight for chunk in chunks], dim=1),
        effective_length=torch.stack([chunk.effective_length for chunk in chunks]).sum(0),
        operator_s=operator_s,
        eager_s=eager_s,
        positions_compared=agreement.positions,
        reward_difference=agreement.reward_difference,
    )

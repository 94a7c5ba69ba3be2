"""Scores of responses without the logits of all positions at once: chunk by chunk, from the models' hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruneopd_kernels import PruneConfig, next_drift_count, token_stats

from .errors import TrainerError
from .models import Pair
from .rollouts import Rollouts
from .scoring import follow

CHUNK = 32
"""Positions of each response whose logits exist at a time."""


class Scores(NamedTuple):
    """Of B responses of up to T tokens; 0 or False where masked."""

    mask: Tensor
    """`[B, T]` bool: True at a response's tokens."""
    overlap: Tensor
    """`[B, T]` float32 (eq. 6)."""
    drift: Tensor
    """`[B, T]` bool (eq. 7, or eq. 16 with `metric="top_p"`)."""
    weight: Tensor
    """`[B, T]` float32 (eq. 10)."""
    acceptance: Tensor
    """`[B, T]` bool: whether the token is in the teacher's nucleus (eq. 15)."""
    reverse_kl: Tensor
    """`[B, T]` float32: KL(student || teacher), in nats."""
    effective_length: Tensor
    """`[B]` int32 (eq. 12)."""


@torch.no_grad()
def score_in_chunks(pair: Pair, rollouts: Rollouts, config: PruneConfig) -> Scores:
    """Scores every token, in chunks along the responses with the drift count carried: few logits exist at a time."""
    states = [hidden_states(model, rollouts).split(CHUNK, dim=1) for model in (pair.student, pair.teacher)]
    heads: list[Any] = [pair.student.get_output_embeddings(), pair.teacher.get_output_embeddings()]
    masks, ids = rollouts.mask.split(CHUNK, dim=1), rollouts.response_ids.split(CHUNK, dim=1)
    carry, chunks = None, []
    for student_states, teacher_states, mask, token_ids in zip(*states, masks, ids, strict=True):
        stats = token_stats(
            heads[0](student_states),
            heads[1](teacher_states),
            mask,
            token_ids=token_ids,
            k=min(config.k, pair.vocab_size),
            vocab_size=pair.vocab_size,
        )
        along, accepted = follow(stats, mask, token_ids, config, carry)
        carry = next_drift_count(along.drift_count)
        chunks.append(
            Scores(
                mask=mask,
                overlap=stats.overlap,
                drift=along.drift,
                weight=along.weight,
                acceptance=accepted,
                reverse_kl=stats.reverse_kl,
                effective_length=along.effective_length,
            )
        )
    *per_position, effective_lengths = zip(*chunks, strict=True)
    return Scores._make([*(torch.cat(parts, dim=1) for parts in per_position), torch.stack(effective_lengths).sum(0)])


def hidden_states(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
    """`[B, T, H]`: the states from which the model predicts each token of the responses."""
    states: Tensor = model.base_model(
        input_ids=rollouts.token_ids,
        attention_mask=rollouts.attention_mask,
        position_ids=rollouts.position_ids,
        use_cache=False,
    ).last_hidden_state
    return states[:, rollouts.prompt_length - 1 : -1]


def check_head(model: PreTrainedModel, token_ids: Tensor) -> None:
    """Checks that logits are the head times the last hidden state, for `[1, P]` token ids.

    Raises:
        TrainerError: They are more than that, for instance capped: chunks of them cannot be had from hidden states.
    """
    untyped: Any = model
    with torch.no_grad():
        states = untyped.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
        expected = untyped(input_ids=token_ids, use_cache=False).logits
        logits = untyped.get_output_embeddings()(states)
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        rule = "be the head times the last hidden state"
        raise TrainerError(f"the logits of the model in {model.name_or_path} must {rule}, got something else")

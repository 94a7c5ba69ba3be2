"""The peers of the losses: the same losses as one writes them in PyTorch today, for autograd to differentiate.

`logprob_dtype` is as in `bench/eager.py`. For `topk_forward_kl` trainers do one of three things: form the log-softmax
of all logits; go through the positions in chunks, which saves the log-softmax but keeps a float32 copy of the logits
for the backward pass; or do the chunks again in the backward pass, which keeps nothing. A trainer's chunk holds 256 to
4096 of its tens of thousands of positions; here it is a share of however many there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.eager import overlap_of

CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.2, 3.0
CHUNKS, CHECKPOINTED_CHUNKS = 4, 16


def topk_policy_loss(
    student_logits: Tensor, topk_ids: Tensor, advantages: Tensor, logprob_dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    logprobs = student_logits.log_softmax(-1, dtype=logprob_dtype).gather(-1, topk_ids)
    ratio = (logprobs - logprobs.detach()).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    losses = torch.where(advantages < 0, losses.minimum(-advantages * CLIP_DUAL), losses)
    return {"loss": losses.sum(-1)}


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, logprob_dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype)
    logq = teacher_logits.log_softmax(-1, dtype=logprob_dtype)
    return {"loss": weight * (logp.exp() * (logp - logq)).sum(-1)}


def topk_forward_kl(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    logprob_dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype)
    # Not of logp: in half precision two different logits may have the same.
    student_topk_ids = student_logits.topk(teacher_topk_ids.shape[-1]).indices
    return _forward_kl(logp.gather(-1, teacher_topk_ids), student_topk_ids, teacher_topk_ids, teacher_topk_logprobs)


def topk_forward_kl_chunked(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor
) -> dict[str, Tensor]:
    return _in_chunks(CHUNKS, _logprobs_of, student_logits, teacher_topk_ids, teacher_topk_logprobs)


def topk_forward_kl_checkpointed(
    student_logits: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor
) -> dict[str, Tensor]:
    def again(logits: Tensor, ids: Tensor) -> Tensor:
        return checkpoint(_logprobs_of, logits, ids, use_reentrant=False)  # type: ignore[no-any-return]

    return _in_chunks(CHECKPOINTED_CHUNKS, again, student_logits, teacher_topk_ids, teacher_topk_logprobs)


def _in_chunks(
    chunks: int,
    logprobs_of: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
) -> dict[str, Tensor]:
    student_topk_ids = student_logits.topk(teacher_topk_ids.shape[-1]).indices
    pieces = zip(*(x.flatten(0, -2).chunk(chunks) for x in (student_logits, teacher_topk_ids)), strict=True)
    logprobs = torch.cat([logprobs_of(logits, ids) for logits, ids in pieces]).view_as(teacher_topk_logprobs)
    return _forward_kl(logprobs, student_topk_ids, teacher_topk_ids, teacher_topk_logprobs)


def _logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


def _forward_kl(
    student_logprobs: Tensor, student_topk_ids: Tensor, teacher_topk_ids: Tensor, teacher_topk_logprobs: Tensor
) -> dict[str, Tensor]:
    """The loss from log-probabilities of the teacher's candidates, and what trainers log beside it."""
    terms = teacher_topk_logprobs.exp() * (teacher_topk_logprobs - student_logprobs)
    shared = (teacher_topk_ids.unsqueeze(-1) == student_topk_ids.unsqueeze(-2)).any(-1)
    return {
        "loss": terms.sum(-1),
        "student_mass": student_logprobs.detach().exp().sum(-1),
        "teacher_mass": teacher_topk_logprobs.exp().sum(-1),
        "overlap": overlap_of(student_topk_ids, teacher_topk_ids),
        "overlap_token_advantage": -(terms.detach() * shared).sum(-1) / shared.sum(-1).clamp(min=1),
        "student_topk_ids": student_topk_ids,
    }

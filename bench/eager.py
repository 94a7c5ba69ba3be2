"""The peers: the same computations as one writes them in PyTorch today, without this library.

`logprob_dtype` is the dtype in which log-probabilities are formed. For half-precision logits there are two habits:
float32 (what trainers do when they care about a difference of two log-probabilities), and None, the logits' own dtype,
which is faster and good to two digits. Both are timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

W_DROP, W_BASE, THRESHOLD, EPS = 0.01, 0.5, 0.7, 1e-8


def overlap_of(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> Tensor:
    matches = student_topk_ids.unsqueeze(-1) == teacher_topk_ids.unsqueeze(-2)
    return matches.any(-1).float().mean(-1)


def reliability_from_drift(drift: Tensor) -> dict[str, Tensor]:
    drift_count = drift.cumsum(-1)
    reliability = (1 - W_DROP * drift_count).clamp(0, 1)
    return {
        "drift_count": drift_count,
        "reliability": reliability,
        "weight": reliability + W_BASE,
        "effective_length": (reliability > EPS).sum(-1),
    }


def reliability_from_topk(student_topk_ids: Tensor, teacher_topk_ids: Tensor) -> dict[str, Tensor]:
    overlap = overlap_of(student_topk_ids, teacher_topk_ids)
    drift = overlap < THRESHOLD
    return {"overlap": overlap, "drift": drift, **reliability_from_drift(drift)}


def reliability(
    student_logits: Tensor, teacher_logits: Tensor, k: int = 16, logprob_dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    topk_ids = student_logits.topk(k).indices
    scan = reliability_from_topk(topk_ids, teacher_logits.topk(k).indices)
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype).gather(-1, topk_ids)
    logq = teacher_logits.log_softmax(-1, dtype=logprob_dtype).gather(-1, topk_ids)
    rewards = scan["weight"].unsqueeze(-1) * logp.softmax(-1) * (logq - logp)
    return {**scan, "topk_ids": topk_ids, "rewards": rewards}


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    k: int = 16,
    logprob_dtype: torch.dtype | None = torch.float32,
) -> dict[str, Tensor]:
    student_top, student_topk_ids = student_logits.topk(k)
    teacher_top, teacher_topk_ids = teacher_logits.topk(k)
    logp = student_logits.log_softmax(-1, dtype=logprob_dtype)
    logq = teacher_logits.log_softmax(-1, dtype=logprob_dtype)
    p, q = logp.exp(), logq.exp()
    token = token_ids.unsqueeze(-1)
    return {
        "student_topk_ids": student_topk_ids,
        "student_topk_logprobs": logp.gather(-1, student_topk_ids),
        "teacher_topk_ids": teacher_topk_ids,
        "teacher_topk_logprobs": logq.gather(-1, teacher_topk_ids),
        "teacher_on_student_logprobs": logq.gather(-1, student_topk_ids),
        "student_on_teacher_logprobs": logp.gather(-1, teacher_topk_ids),
        "overlap": overlap_of(student_topk_ids, teacher_topk_ids),
        "student_lse": student_top[..., 0] - logp.amax(-1),  # logsumexp would be a second, slower pass
        "teacher_lse": teacher_top[..., 0] - logq.amax(-1),
        "student_entropy": -(p * logp).sum(-1),
        "teacher_entropy": -(q * logq).sum(-1),
        "reverse_kl": (p * (logp - logq)).sum(-1),
        "forward_kl": (q * (logq - logp)).sum(-1),
        "student_token_logprob": logp.gather(-1, token).squeeze(-1),
        "teacher_token_logprob": logq.gather(-1, token).squeeze(-1),
    }

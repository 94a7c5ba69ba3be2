"""Candidates, log-probabilities, entropies and divergences of both sides at each position (eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import (
    entropy,
    float_type,
    kl_divergence,
    overlap_count,
    overlap_of,
    read_rows,
    token_logprobs,
    topk_ids,
    valid_positions,
)
from ..results import TokenStats
from ._checking import check


@torch.no_grad()
def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    k: int = 16,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TokenStats:
    """The definition of `pruneopd_kernels.token_stats`."""
    check(
        "token_stats",
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        token_ids=token_ids,
        k=k,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
    )
    valid = valid_positions(mask, student_logits, student_logits.shape[:-1])
    student = read_rows(student_logits, valid, vocab_size, student_temperature)
    teacher = read_rows(teacher_logits, valid, vocab_size, teacher_temperature)
    student_topk_ids, teacher_topk_ids = (topk_ids(rows.logits, k) for rows in (student, teacher))
    count = overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(student.broken | teacher.broken, 0)

    dtype = float_type(student_logits, teacher_logits)

    def stored(values: Tensor) -> Tensor:
        where = valid if values.ndim == valid.ndim else valid[..., None]
        return torch.where(where, values, 0.0).to(dtype)

    return TokenStats(
        student_topk_ids=student_topk_ids,
        student_topk_logprobs=stored(student.logprobs.gather(-1, student_topk_ids)),
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_logprobs=stored(teacher.logprobs.gather(-1, teacher_topk_ids)),
        teacher_on_student_logprobs=stored(teacher.logprobs.gather(-1, student_topk_ids)),
        student_on_teacher_logprobs=stored(student.logprobs.gather(-1, teacher_topk_ids)),
        overlap=stored(overlap_of(count, k)),
        student_lse=stored(student.lse()),
        teacher_lse=stored(teacher.lse()),
        student_entropy=stored(entropy(student)),
        teacher_entropy=stored(entropy(teacher)),
        reverse_kl=stored(kl_divergence(student, teacher)),
        forward_kl=stored(kl_divergence(teacher, student)),
        student_token_logprob=stored(token_logprobs(student, token_ids)),
        teacher_token_logprob=stored(token_logprobs(teacher, token_ids)),
    )

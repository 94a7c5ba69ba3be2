"""Candidates, log-probabilities, entropies and divergences of both sides at each position (eq. 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import (
    entropy,
    filled_slots,
    float_type,
    kl_divergence,
    overlap_of,
    read_rows,
    token_logprobs,
    topk_ids,
    valid_positions,
)
from ..ops import TokenStats


@torch.no_grad()
def token_stats(a: Any) -> TokenStats:
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    student = read_rows(a.student_logits, valid, a.vocab_size, a.student_temperature)
    teacher = read_rows(a.teacher_logits, valid, a.vocab_size, a.teacher_temperature)
    student_topk_ids, teacher_topk_ids = (topk_ids(rows.logits, a.k) for rows in (student, teacher))
    slots = filled_slots(student, student_topk_ids), filled_slots(teacher, teacher_topk_ids)

    dtype = float_type(a.student_logits, a.teacher_logits)

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
        overlap=stored(overlap_of(*slots, student.broken | teacher.broken)),
        student_lse=stored(student.lse()),
        teacher_lse=stored(teacher.lse()),
        student_entropy=stored(entropy(student)),
        teacher_entropy=stored(entropy(teacher)),
        reverse_kl=stored(kl_divergence(student, teacher)),
        forward_kl=stored(kl_divergence(teacher, student)),
        student_token_logprob=stored(token_logprobs(student, a.token_ids)),
        teacher_token_logprob=stored(token_logprobs(teacher, a.token_ids)),
    )

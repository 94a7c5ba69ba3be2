"""KL(teacher || student) over the teacher's candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formulas import (
    ForwardTerms,
    Rows,
    candidate_logprobs,
    float_type,
    forward_terms,
    measures_of,
    read_rows,
    topk_ids,
    valid_positions,
)
from ..results import TopkForwardKl
from ._checking import check
from ._losses import differentiable


def topk_forward_kl(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    logprob_min: float | None = None,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TopkForwardKl:
    """The definition of `pruneopd_kernels.topk_forward_kl`."""
    check(
        "topk_forward_kl",
        student_logits=student_logits,
        teacher_topk_ids=teacher_topk_ids,
        teacher_topk_logprobs=teacher_topk_logprobs,
        mask=mask,
        logprob_min=logprob_min,
        student_temperature=student_temperature,
        vocab_size=vocab_size,
    )
    valid = valid_positions(mask, student_logits, student_logits.shape[:-1])

    dtype = float_type(student_logits)

    def rows_of(logits: Tensor) -> Rows:
        return read_rows(logits, valid, vocab_size, student_temperature)

    def terms_of(rows: Rows) -> ForwardTerms:
        logprobs = candidate_logprobs(rows.logprobs, teacher_topk_ids)
        return forward_terms(logprobs, rows.broken, teacher_topk_ids, teacher_topk_logprobs, logprob_min)

    def loss_of(logits: Tensor) -> Tensor:
        return torch.where(valid, terms_of(rows_of(logits)).terms.sum(-1), 0.0).to(dtype)

    with torch.no_grad():
        rows = rows_of(student_logits.detach())
        student_topk_ids = topk_ids(rows.logits, teacher_topk_ids.shape[-1])
        measures = measures_of(student_topk_ids, rows.broken, terms_of(rows), teacher_topk_ids, valid)
    return TopkForwardKl(
        differentiable(loss_of, student_logits, vocab_size),
        measures.student_mass.to(dtype),
        measures.teacher_mass.to(dtype),
        measures.overlap.to(torch.float32),
        measures.overlap_token_advantage.to(dtype),
        student_topk_ids,
    )

"""KL(teacher || student) over the teacher's candidates."""

from __future__ import annotations

from typing import Any

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
from ..ops import TopkForwardKl
from ._losses import differentiable


def topk_forward_kl(a: Any) -> TopkForwardKl:
    """The definition of `pruneopd_kernels.topk_forward_kl`."""
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])

    dtype = float_type(a.student_logits)

    def rows_of(logits: Tensor) -> Rows:
        return read_rows(logits, valid, a.vocab_size, a.student_temperature)

    def terms_of(rows: Rows) -> ForwardTerms:
        logprobs = candidate_logprobs(rows.logprobs, a.teacher_topk_ids)
        return forward_terms(logprobs, rows.broken, a.teacher_topk_ids, a.teacher_topk_logprobs, a.logprob_min)

    def loss_of(logits: Tensor) -> Tensor:
        return torch.where(valid, terms_of(rows_of(logits)).terms.sum(-1), 0.0).to(dtype)

    with torch.no_grad():
        rows = rows_of(a.student_logits.detach())
        student_topk_ids = topk_ids(rows.logits, a.teacher_topk_ids.shape[-1])
        measures = measures_of(student_topk_ids, rows.broken, terms_of(rows), a.teacher_topk_ids, valid)
    return TopkForwardKl(
        differentiable(loss_of, a.student_logits, a.vocab_size),
        measures.student_mass.to(dtype),
        measures.teacher_mass.to(dtype),
        measures.overlap.to(torch.float32),
        measures.overlap_token_advantage.to(dtype),
        student_topk_ids,
    )

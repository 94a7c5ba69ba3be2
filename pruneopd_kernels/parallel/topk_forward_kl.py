"""KL(teacher || student) over candidates, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from ..formulas import float_type, forward_terms, measures_of, valid_positions
from ..ops import TopkForwardKl
from ._agreement import Slices
from ._loss import student_rows, through_logprobs


def topk_forward_kl(slices: Slices, a: Any) -> TopkForwardKl:
    dtype, ids = float_type(a.student_logits), a.teacher_topk_ids
    with torch.no_grad():
        valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
        rows = student_rows(slices, a, ids, valid, ids.shape[-1])
        broken = rows.softmax.broken
        terms = forward_terms(rows.logprobs, broken, ids, a.teacher_topk_logprobs, a.logprob_min)
        measures = measures_of(rows.topk_ids, broken, terms, ids, valid, dtype)
        loss = torch.where(valid, terms.terms.sum(-1), 0.0).to(dtype)
    loss = through_logprobs(slices, a.student_logits, loss, ids, terms.derivatives, rows.softmax, valid)
    return TopkForwardKl(loss, *measures, rows.topk_ids)

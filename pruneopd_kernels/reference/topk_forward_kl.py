"""KL(teacher || student) over the teacher's candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import (
    ForwardTerms,
    Rows,
    candidate_logprobs,
    coefficients_of,
    float_type,
    forward_terms,
    measures_of,
    read_rows,
    row_state,
    topk_ids,
    valid_positions,
)
from ..ops import TopkForwardKl
from ._losses import differentiable


def topk_forward_kl(a: Any) -> TopkForwardKl:
    """Compute the loss, differentiable by autograd, and the measures."""
    with torch.no_grad():
        _, terms, rows, valid = _forward(a, a.student_logits)
    loss = differentiable(lambda logits: _forward(a, logits)[0], a.student_logits, a.vocab_size)
    return TopkForwardKl(loss, *_measures(a, terms, rows, valid))


def forward_pass(a: Any) -> tuple[Tensor, ...]:
    """Compute the outputs, and save for `logprobs_backward` the coefficients and the state of the row."""
    loss, terms, rows, valid = _forward(a, a.student_logits)
    coefficients = coefficients_of(loss, terms.derivatives, valid)
    return loss, *_measures(a, terms, rows, valid), coefficients, torch.stack(row_state(rows, valid), -1)


def _forward(a: Any, student_logits: Tensor) -> tuple[Tensor, ForwardTerms, Rows, Tensor]:
    valid = valid_positions(a.mask, student_logits, student_logits.shape[:-1])
    rows = read_rows(student_logits, valid, a.vocab_size, a.student_temperature)
    logprobs = candidate_logprobs(rows.logprobs, a.teacher_topk_ids)
    terms = forward_terms(logprobs, rows.broken, a.teacher_topk_ids, a.teacher_topk_logprobs, a.logprob_min)
    loss = torch.where(valid, terms.terms.sum(-1), 0.0).to(float_type(student_logits))
    return loss, terms, rows, valid


def _measures(a: Any, terms: ForwardTerms, rows: Rows, valid: Tensor) -> tuple[Tensor, ...]:
    ids = topk_ids(rows.logits, a.teacher_topk_ids.shape[-1])
    measures = measures_of(ids, rows.broken, terms, a.teacher_topk_ids, valid, float_type(a.student_logits))
    return *measures, ids

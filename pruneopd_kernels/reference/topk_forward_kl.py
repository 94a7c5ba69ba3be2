"""KL(teacher || student) over the teacher's candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..results import TopkForwardKl
from ._checking import check
from ._drift import overlap_count, overlap_of
from ._losses import StudentRows, candidate_logprobs, differentiable, student_rows
from ._rows import float_type, valid_positions
from ._rows import topk_ids as first_ids


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

    def rows_of(logits: Tensor) -> StudentRows:
        return student_rows(logits, valid, logits.shape[-1], student_temperature)

    def terms_of(rows: StudentRows) -> ForwardTerms:
        logprobs = candidate_logprobs(rows.logprobs, teacher_topk_ids)
        return forward_terms(logprobs, rows.broken, teacher_topk_ids, teacher_topk_logprobs, logprob_min)

    def loss_of(logits: Tensor) -> Tensor:
        return torch.where(valid, terms_of(rows_of(logits)).terms.sum(-1), 0.0).to(dtype)

    with torch.no_grad():
        rows = rows_of(student_logits[..., :vocab_size].detach())
        student_topk_ids = first_ids(rows.logits, teacher_topk_ids.shape[-1])
        measures = measures_of(student_topk_ids, rows.broken, terms_of(rows), teacher_topk_ids, valid)
    return TopkForwardKl(
        differentiable(loss_of, student_logits, vocab_size),
        measures.student_mass.to(dtype),
        measures.teacher_mass.to(dtype),
        measures.overlap.to(torch.float32),
        measures.overlap_token_advantage.to(dtype),
        student_topk_ids,
    )


class ForwardTerms(NamedTuple):
    """Of each of the teacher's candidates, in float64."""

    terms: Tensor  # of the loss
    derivatives: Tensor  # of the terms by the student's log-probabilities
    student_logprobs: Tensor  # -inf for padding
    teacher_logprobs: Tensor


class Measures(NamedTuple):
    student_mass: Tensor
    teacher_mass: Tensor
    overlap: Tensor
    overlap_token_advantage: Tensor


def forward_terms(
    student_logprobs: Tensor,
    broken: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    logprob_min: float | None,
) -> ForwardTerms:
    """From the student's log-probabilities of the teacher's candidates, and where its rows are broken."""
    padding = teacher_topk_ids < 0
    a = student_logprobs.masked_fill(padding, -torch.inf)
    b = teacher_topk_logprobs.detach().to(torch.float64).masked_fill(padding, -torch.inf)
    a_raised, b_raised, moves = a, b, ~padding
    if logprob_min is not None:
        moves = moves & ~(a < logprob_min)
        a_raised, b_raised = a.clamp(min=logprob_min), b.clamp(min=logprob_min)
    q = b_raised.exp()
    has_mass = (b_raised != -torch.inf) & ~padding
    impossible = has_mass & (a_raised == -torch.inf) & ~b.isnan()
    counts = has_mass & ~impossible
    terms = torch.where(counts, q * (torch.where(counts, b_raised, 0.0) - torch.where(counts, a_raised, 0.0)), 0.0)
    terms = terms.masked_fill(a.isnan(), torch.nan)  # also of an id that does not exist
    # 0 and no less where both are the same; not masked, for its derivative is not 0
    terms = terms.masked_fill(impossible, torch.inf)
    # A row that is broken makes even a loss over nothing NaN.
    terms = terms.masked_fill(broken[..., None], torch.nan)
    return ForwardTerms(terms, torch.where(moves & has_mass, -q, 0.0), a, b)


def measures_of(
    student_topk_ids: Tensor, broken: Tensor, terms: ForwardTerms, teacher_topk_ids: Tensor, valid: Tensor
) -> Measures:
    count = overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(broken, 0)
    shared = (teacher_topk_ids[..., :, None] == student_topk_ids[..., None, :]).any(-1)
    advantage = torch.where(shared, -terms.terms, 0.0).sum(-1) / shared.sum(-1).clamp(min=1)
    measures = (
        terms.student_logprobs.exp().sum(-1).masked_fill(broken, torch.nan),
        terms.teacher_logprobs.exp().sum(-1),
        overlap_of(count, teacher_topk_ids.shape[-1]),
        advantage.masked_fill(broken, torch.nan),
    )
    return Measures(*(torch.where(valid, x, 0.0) for x in measures))

"""What two models say about each position, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import float_type, overlap_count, overlap_of, valid_positions
from ..ops import TokenStats
from ._agreement import Slices
from ._exchange import gather
from ._rows import Softmax, candidates_where, entropy, from_owners, kl_divergence, whole_rows
from ._slice import KL_UNIT, logits_of_ids, pair_of, sent_divergence


@torch.no_grad()
def token_stats(slices: Slices, a: Any) -> TokenStats:
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    dtype = float_type(a.student_logits, a.teacher_logits)
    pair = pair_of(slices, a, valid, a.k)
    x, y = (a.student_logits, a.student_temperature), (a.teacher_logits, a.teacher_temperature)
    tokens = [] if a.token_ids is None else [logits_of_ids(slices, z, a.token_ids[..., None], valid) for z, _ in (x, y)]
    student, teacher, (*entropies, reverse_kl, forward_kl), token_logits = _split(
        gather(
            slices,
            valid.shape,
            dtype,
            *(*pair.student, logits_of_ids(slices, a.teacher_logits, pair.student.topk_ids, valid)),
            *(*pair.teacher, logits_of_ids(slices, a.student_logits, pair.teacher.topk_ids, valid)),
            *(pair.student_entropy, pair.teacher_entropy),
            sent_divergence(slices, pair.reverse_kl, x, y),
            sent_divergence(slices, pair.forward_kl, y, x),
            *tokens,
        )
    )
    p, (student_logits, student_topk_ids, teacher_on_student) = whole_rows(slices, a.k, a.student_temperature, *student)
    q, (teacher_logits, teacher_topk_ids, student_on_teacher) = whole_rows(slices, a.k, a.teacher_temperature, *teacher)
    count = overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(p.broken | q.broken, 0)

    def stored(values: Tensor) -> Tensor:
        where = valid if values.ndim == valid.ndim else valid[..., None]
        return torch.where(where, values, 0.0).to(dtype)

    def token_logprob(softmax: Softmax, logits: list[Tensor]) -> Tensor:
        """NaN where there is no token, or none of this id."""
        if not logits:
            return torch.full_like(softmax.top, torch.nan)
        exists = (a.token_ids >= 0) & (a.token_ids < slices.vocab_size)
        logit = from_owners(slices, a.token_ids, logits[0][..., 0])[..., None]
        return softmax.logprobs(logit)[..., 0].masked_fill(~exists, torch.nan)

    return TokenStats(
        student_topk_ids=candidates_where(valid, student_topk_ids),
        student_topk_logprobs=stored(p.logprobs(student_logits)),
        teacher_topk_ids=candidates_where(valid, teacher_topk_ids),
        teacher_topk_logprobs=stored(q.logprobs(teacher_logits)),
        teacher_on_student_logprobs=stored(q.logprobs(teacher_on_student)),
        student_on_teacher_logprobs=stored(p.logprobs(student_on_teacher)),
        overlap=stored(overlap_of(count, a.k)),
        student_lse=stored(p.lse()),
        teacher_lse=stored(q.lse()),
        student_entropy=stored(entropy(p, entropies[0])),
        teacher_entropy=stored(entropy(q, entropies[1])),
        reverse_kl=stored(kl_divergence(p, q, reverse_kl * KL_UNIT)),
        forward_kl=stored(kl_divergence(q, p, forward_kl * KL_UNIT)),
        student_token_logprob=stored(token_logprob(p, token_logits[:1])),
        teacher_token_logprob=stored(token_logprob(q, token_logits[1:])),
    )


def _split(sent: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Return what belongs to the student, to the teacher, to whole rows, and to the tokens."""
    return sent[:4], sent[4:8], sent[8:12], sent[12:]

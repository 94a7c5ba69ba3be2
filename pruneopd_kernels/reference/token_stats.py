"""Candidates, log-probabilities, entropies and divergences of both sides at each position (eq. 6)."""

from typing import Any

import torch

from .. import formulas
from ..formulas import entropy, kl_divergence, token_logprobs
from ..ops import TokenStats


@torch.no_grad()
def token_stats(a: Any) -> TokenStats:
    valid = formulas.valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    p, q = formulas.read_both(a, valid)
    student, teacher = formulas.candidates(p, a.k), formulas.candidates(q, a.k)
    stats = TokenStats(
        student_topk_ids=student.ids,
        student_topk_logprobs=student.logprobs,
        teacher_topk_ids=teacher.ids,
        teacher_topk_logprobs=teacher.logprobs,
        teacher_on_student_logprobs=q.logprobs.gather(-1, student.ids),
        student_on_teacher_logprobs=p.logprobs.gather(-1, teacher.ids),
        overlap=formulas.overlap_of(student.slots, teacher.slots, p.broken | q.broken),
        student_lse=p.lse(),
        teacher_lse=q.lse(),
        student_entropy=entropy(p),
        teacher_entropy=entropy(q),
        reverse_kl=kl_divergence(p, q),
        forward_kl=kl_divergence(q, p),
        student_token_logprob=token_logprobs(p, a.token_ids),
        teacher_token_logprob=token_logprobs(q, a.token_ids),
    )
    return TokenStats._make(formulas.stored(stats, valid, a))

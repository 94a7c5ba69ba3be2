"""Reliability and rewards from both sides' logits (eq. 6-12, 14-16); with entropies and KL for a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import formulas
from ..formulas import Candidates, Rows, filled_slots, float_type, read_rows, topk_ids, valid_positions
from ..ops import Reliability


class Scored(NamedTuple):
    """What `reliability` returns, and what a loss is made of."""

    reliability: Reliability
    accepted: Tensor
    student: Rows
    teacher: Rows
    valid: Tensor


def reliability(a: Any) -> Reliability:
    return score(a, None).reliability


@torch.no_grad()
def score(a: Any, weight: Tensor | None) -> Scored:
    """Score the positions; a weight takes the place of L in the rewards."""
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    student = read_rows(a.student_logits, valid, a.vocab_size, a.student_temperature)
    teacher = read_rows(a.teacher_logits, valid, a.vocab_size, a.teacher_temperature)
    ours, theirs = (_candidates(rows, a.k) for rows in (student, teacher))
    (*scores, rewards), accepted = formulas.score(ours, theirs, teacher.logprobs.gather(-1, ours.ids), valid, a, weight)
    outputs = Reliability._make((*scores, rewards.to(float_type(a.student_logits, a.teacher_logits))))
    return Scored(outputs, accepted, student, teacher, valid)


def _candidates(rows: Rows, k: int) -> Candidates:
    ids = topk_ids(rows.logits, k)
    return Candidates(ids, filled_slots(rows, ids), rows.logprobs.gather(-1, ids), rows.broken)

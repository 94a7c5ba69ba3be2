"""Reliability and rewards from both sides' logits (eq. 6-12, 14-16); with entropies and KL for a loss."""

from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..formulas import Rows
from ..ops import Reliability


def reliability(a: Any) -> Reliability:
    return score(a, None)[0]


@torch.no_grad()
def score(a: Any, weight: Tensor | None) -> tuple[Reliability, Tensor, Rows, Rows, Tensor]:
    """Return the results, acceptance, both models' rows and the valid positions; a weight replaces L in the rewards."""
    valid = formulas.valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    rows = formulas.read_both(a, valid)
    student, teacher = (formulas.candidates(x, a.k) for x in rows)
    of_teacher = rows[1].logprobs.gather(-1, student.ids)
    (*scores, rewards), accepted = formulas.score(student, teacher, of_teacher, valid, a, weight)
    outputs = Reliability._make((*scores, rewards.to(formulas.float_type(a.student_logits, a.teacher_logits))))
    return outputs, accepted, *rows, valid

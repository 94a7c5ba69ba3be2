"""Scoring, and KL from the same read, each rank holding a slice of the vocabulary."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..formulas import where_used
from ..ops import Reliability
from ..ops.opd_loss import OpdScores
from ._agreement import Slices
from ._exchange import gather
from ._rows import Row, kl_divergence, whole_row
from ._slice import own, pair_of


def reliability(slices: Slices, a: Any) -> Reliability:
    arguments = a._asdict() | {"weight": None, "entropies": False, "divergence": False}
    return Reliability(*opd_scores(slices, SimpleNamespace(**arguments))[:8])


def opd_scores(slices: Slices, a: Any) -> Any:
    valid = formulas.valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    student, teacher, entropies, kl = _rows_of(slices, a, valid, a.k, a.entropies, a.divergence)
    teacher_on_student = teacher.logprobs(student.others)
    (*scores, rewards), accepted = formulas.score(
        student.candidates, teacher.candidates, teacher_on_student, valid, a, a.weight
    )
    dtype = formulas.float_type(a.student_logits, a.teacher_logits)
    state = _state(student, teacher, kl, valid)
    if not a.divergence:
        state[..., 2:] = 0.0
    both = (where_used(valid, x).to(dtype) for x in entropies)
    kl = where_used(valid, kl)
    return OpdScores._make((*scores, rewards.to(dtype), accepted, *both, kl, state))


def reverse_kl(slices: Slices, a: Any) -> tuple[Tensor, Tensor]:
    factor = formulas.loss_factor(a.weight, a.mask, own(slices, a.student_logits)[..., 0])
    student, teacher, _, kl = _rows_of(slices, a, factor != 0, 1, False, True)
    loss = formulas.weighted(factor, kl).to(formulas.float_type(a.student_logits, a.teacher_logits))
    return loss, formulas.spoilt_state(_state(student, teacher, kl, factor != 0), loss)


def _rows_of(
    slices: Slices, a: Any, used: Tensor, k: int, entropies: bool, divergence: bool
) -> tuple[Row, Row, list[Tensor], Tensor]:
    """Return both models' rows, their entropies and KL(student || teacher); 0 for what is not asked for."""
    x, y = own(slices, a.student_logits), own(slices, a.teacher_logits)
    temperatures, divergences = (a.student_temperature, a.teacher_temperature), entropies or divergence
    mine = pair_of(slices, x, y, used, k, temperatures, divergences)
    if not entropies:
        mine = mine[0]._replace(entropy=None), mine[1]._replace(entropy=None)
    sides = gather(slices, used.shape, mine[0], mine[1]._replace(divergence=None))
    p, q = (whole_row(slices, k, T, side, used) for T, side in zip(temperatures, sides, strict=True))
    nothing = torch.zeros_like(p.top)
    of_rows = [row.entropy(side.entropy) if entropies else nothing for row, side in zip((p, q), sides, strict=True)]
    return p, q, of_rows, kl_divergence(p, q, sides[0].divergence) if divergences else nothing


def _state(student: Row, teacher: Row, kl: Tensor, used: Tensor) -> Tensor:
    # The first candidate is the peak.
    peak = student.logprobs(student.topk_logits[..., :1]) - teacher.logprobs(student.others[..., :1])
    return formulas.reverse_kl_state(student.state(used, None), teacher.state(used, None), peak[..., 0], kl, used)

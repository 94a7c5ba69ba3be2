"""KL(teacher || student) over the teacher's candidates."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..ops import TopkForwardKl
from ._losses import differentiable
from .row_stats import row_stats


def topk_forward_kl(a: Any) -> TopkForwardKl:

    def loss_of(student_logits: Tensor) -> Tensor:
        valid = formulas.valid_positions(a.mask, student_logits, student_logits.shape[:-1])
        rows = formulas.read_rows(student_logits, valid, a.vocab_size, a.student_temperature)
        slots = formulas.filled_from_outside(a.teacher_topk_ids, a.teacher_topk_logprobs)
        kl = formulas.topk_divergence(formulas.candidate_logprobs(rows.logprobs, slots), slots, a)
        loss = formulas.where_used(valid, kl.loss.masked_fill(rows.broken, torch.nan))
        return loss.to(formulas.float_type(student_logits))

    of_row = {"logits": a.student_logits, "token_ids": a.teacher_topk_ids, "temperature": a.student_temperature}
    rest = {"k": a.teacher_topk_ids.shape[-1], "entropy": False, "mask": a.mask, "vocab_size": a.vocab_size}
    row = row_stats(SimpleNamespace(**of_row, **rest))
    (_, *measures), _ = formulas.topk_forward_kl(row, a)
    loss = differentiable(loss_of, a.student_logits, a.vocab_size)
    return TopkForwardKl._make((loss, *measures, row.topk_ids))

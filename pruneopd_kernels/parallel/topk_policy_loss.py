"""The clipped policy-gradient loss, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formulas import float_type, policy_positions, policy_terms
from ._agreement import Slices
from ._loss import student_rows, through_logprobs


def topk_policy_loss(slices: Slices, a: Any) -> Tensor:
    with torch.no_grad():
        used = policy_positions(a.topk_ids, a.advantages, a.mask)
        rows = student_rows(slices, a, a.topk_ids, used, 1)
        terms, derivatives = policy_terms(
            rows.logprobs, a.topk_ids, a.advantages, a.old_logprobs, a.clip_low, a.clip_high, a.clip_dual
        )
        loss = torch.where(used, terms.sum(-1), 0.0).to(float_type(a.student_logits))
    return through_logprobs(slices, a.student_logits, loss, a.topk_ids, derivatives, rows.softmax, used)

"""The clipped policy-gradient loss over candidates."""

from typing import Any

from torch import Tensor

from ..formulas import candidate_logprobs, float_type, policy_positions, policy_terms, read_rows, where_used
from ._losses import differentiable


def topk_policy_loss(a: Any) -> Tensor:
    used = policy_positions(a.topk_ids, a.advantages, a.mask)

    def loss_of(student_logits: Tensor) -> Tensor:
        rows = read_rows(student_logits, used, a.vocab_size, a.student_temperature)
        terms, _ = policy_terms(candidate_logprobs(rows.logprobs, a.topk_ids), a)
        return where_used(used, terms.sum(-1)).to(float_type(student_logits))

    return differentiable(loss_of, a.student_logits, a.vocab_size)

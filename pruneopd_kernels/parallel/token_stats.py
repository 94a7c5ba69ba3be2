"""What two models say about each position, each rank holding a slice of the vocabulary."""

from typing import Any

import torch
from torch import Tensor

from ..formulas import overlap_of, stored, valid_positions
from ..ops import TokenStats
from ._agreement import Slices
from ._exchange import Side, gather
from ._rows import Row, from_owners, kl_divergence, whole_row
from ._slice import logits_of_ids, own, pair_of


def token_stats(slices: Slices, a: Any) -> TokenStats:
    valid = valid_positions(a.mask, a.student_logits, a.student_logits.shape[:-1])
    x, y = own(slices, a.student_logits), own(slices, a.teacher_logits)
    temperatures = a.student_temperature, a.teacher_temperature
    student, teacher = pair_of(slices, x, y, valid, a.k, temperatures, divergences=True)
    teacher = teacher._replace(others=logits_of_ids(slices, x, teacher.topk_ids, valid))
    if a.token_ids is not None:
        tokens = a.token_ids[..., None]
        student = student._replace(of_ids=logits_of_ids(slices, x, tokens, valid))
        teacher = teacher._replace(of_ids=logits_of_ids(slices, y, tokens, valid))
    sides = gather(slices, valid.shape, student, teacher)
    p, q = (whole_row(slices, a.k, T, side, valid) for T, side in zip(temperatures, sides, strict=True))

    def token_logprob(row: Row, side: Side) -> Tensor:
        """NaN where there is no token, or none of this id."""
        if side.of_ids is None:
            return torch.full_like(row.top, torch.nan)
        exists = (a.token_ids >= 0) & (a.token_ids < slices.vocab_size)
        logit = from_owners(slices, a.token_ids, side.of_ids[..., 0])[..., None]
        return row.logprobs(logit)[..., 0].masked_fill(~exists, torch.nan)

    stats = TokenStats(
        student_topk_ids=p.topk_ids,
        student_topk_logprobs=p.logprobs(p.topk_logits),
        teacher_topk_ids=q.topk_ids,
        teacher_topk_logprobs=q.logprobs(q.topk_logits),
        teacher_on_student_logprobs=q.logprobs(p.others),
        student_on_teacher_logprobs=p.logprobs(q.others),
        overlap=overlap_of(p.slots, q.slots, p.broken | q.broken),
        student_lse=p.lse(),
        teacher_lse=q.lse(),
        student_entropy=p.entropy(sides[0].entropy),
        teacher_entropy=q.entropy(sides[1].entropy),
        reverse_kl=kl_divergence(p, q, sides[0].divergence),
        forward_kl=kl_divergence(q, p, sides[1].divergence),
        student_token_logprob=token_logprob(p, sides[0]),
        teacher_token_logprob=token_logprob(q, sides[1]),
    )
    return TokenStats._make(stored(stats, valid, a))

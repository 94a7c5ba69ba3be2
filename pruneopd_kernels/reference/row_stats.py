"""The passes over one model's rows: log-probabilities of given ids, and their gradient."""

from typing import Any

import torch
from torch import Tensor

from .. import formulas
from ..ops.row_stats import RowStats
from ._losses import full_width, probabilities


@torch.no_grad()
def row_stats(a: Any) -> RowStats:
    valid, dtype = formulas.valid_positions(a.mask, a.logits, a.logits.shape[:-1]), formulas.float_type(a.logits)
    rows = formulas.read_rows(a.logits, valid, a.vocab_size, a.temperature)
    ids, state = formulas.topk_ids(rows.logits, a.k), formulas.row_state(rows, valid)
    if not a.entropy:
        state[..., 2] = formulas.where_used(valid & rows.broken, state[..., 2])
    return RowStats(
        logprobs=formulas.where_used(valid, formulas.candidate_logprobs(rows.logprobs, a.token_ids)),
        entropy=formulas.where_used(valid & a.entropy, formulas.entropy(rows)).to(dtype),
        lse=formulas.where_used(valid, rows.lse()).to(dtype),
        topk_ids=ids,
        filled=formulas.where_used(valid, (formulas.filled_slots(rows, ids) >= 0).sum(-1)).to(torch.int32),
        state=state,
    )


def logprobs_backward(a: Any) -> tuple[Tensor]:
    """Compute the gradient; ids below 0 or beyond the vocabulary count in the sum of coefficients, without a logit."""
    size = a.vocab_size or a.logits.shape[-1]
    coefficients = a.coefficients.to(torch.float64)
    used = (coefficients != 0).any(-1)
    if a.entropy_coefficient is not None:
        used = used | (a.entropy_coefficient != 0)
    p = probabilities(a.logits, a.state, used, size, a.temperature)
    total = coefficients.sum(-1, keepdim=True)
    gradient = -p * total
    exists = (a.token_ids >= 0) & (a.token_ids < size)
    ids = torch.where(exists, a.token_ids.to(torch.int64), 0)
    gradient = gradient.scatter_add(-1, ids, torch.where(exists, coefficients, 0.0))
    if a.entropy_coefficient is not None:
        reference, mean = a.state[..., :1], a.state[..., 2:]
        of_entropy = -p * ((a.logits[..., :size].to(torch.float64) - reference) / a.temperature - mean)
        of_entropy = torch.where(p == 0, 0.0, of_entropy)
        e = a.entropy_coefficient.to(torch.float64)[..., None]
        gradient = gradient + torch.where(e == 0, 0.0, e * of_entropy)
        total = total + e
    gradient = gradient.masked_fill(~total.isfinite(), torch.nan)
    return (full_width(a.logits, gradient / a.temperature, used),)

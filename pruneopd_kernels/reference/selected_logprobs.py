"""Log-probabilities of given ids, the entropy and the log-sum-exp."""

from typing import Any

import torch

from ..formulas import candidate_logprobs, entropy, float_type, read_rows, valid_positions, where_used
from ..ops import SelectedLogprobs
from ._losses import NanGradient


def selected_logprobs(a: Any) -> SelectedLogprobs:
    """Compute the results, differentiable by autograd; the gradient of a broken row is NaN for every id."""
    valid, dtype = valid_positions(a.mask, a.logits, a.logits.shape[:-1]), float_type(a.logits)
    x = a.logits[..., : a.vocab_size]
    with torch.no_grad():
        rows = read_rows(x, valid, a.vocab_size, a.temperature)
        lse, broken = rows.lse(), rows.broken
    rows = read_rows(torch.where(broken[..., None], 0.0, x), valid, a.vocab_size, a.temperature)
    logprobs = candidate_logprobs(rows.logprobs, a.token_ids)
    logprobs = torch.where(logprobs == -torch.inf, -torch.inf, logprobs)
    outputs = torch.cat([logprobs, entropy(rows)[..., None]], -1)
    outputs = outputs.masked_fill(broken[..., None], torch.nan)
    outputs = outputs + NanGradient.apply(x, outputs.detach(), broken)  # type: ignore[no-untyped-call]
    return SelectedLogprobs(
        where_used(valid, torch.where(a.token_ids < 0, 0.0, outputs[..., :-1])).to(dtype),
        where_used(valid, outputs[..., -1]).to(dtype),
        where_used(valid, lse).to(dtype),
    )

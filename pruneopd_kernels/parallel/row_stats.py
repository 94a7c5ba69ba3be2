"""The pass over one model's rows, each rank holding a slice of the vocabulary."""

from typing import Any

import torch

from ..formulas import float_type, valid_positions, where_used
from ..ops.row_stats import RowStats
from ._agreement import Slices
from ._exchange import gather
from ._rows import from_owners, whole_row
from ._slice import logits_of_ids, own, side_of


def row_stats(slices: Slices, a: Any) -> RowStats:
    used, x = valid_positions(a.mask, a.logits, a.logits.shape[:-1]), own(slices, a.logits)
    k, dtype = max(a.k, 1), float_type(x)  # the first candidate has the greatest logit
    mine = side_of(slices, x, used, k, a.temperature, a.entropy)
    (side,) = gather(slices, used.shape, mine._replace(of_ids=logits_of_ids(slices, x, a.token_ids, used)))
    row = whole_row(slices, k, a.temperature, side, used)
    logprobs = row.logprobs(from_owners(slices, a.token_ids, side.of_ids))
    logprobs = logprobs.masked_fill(a.token_ids >= slices.vocab_size, torch.nan).masked_fill(a.token_ids < 0, 0.0)
    entropy = row.entropy(side.entropy) if a.entropy else torch.zeros_like(row.top)
    return RowStats(
        logprobs=where_used(used, logprobs),
        entropy=where_used(used, entropy).to(dtype),
        lse=where_used(used, row.lse()).to(dtype),
        topk_ids=row.topk_ids[..., : a.k],
        filled=where_used(used, (row.slots[..., : a.k] >= 0).sum(-1)).to(torch.int32),
        state=row.state(used, entropy if a.entropy else None),
    )

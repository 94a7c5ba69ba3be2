"""What a row is, from what is known of each rank's slice of it.

A slice's softmax is told by its greatest logit, exact, and the log of its mass relative to that. Neither loses digits
in a row of strongly negative logits, as a log-sum-exp in float32 would, and all that follows is in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import topk_ids as order
from ._agreement import Slices


class Softmax(NamedTuple):
    """Of whole rows, per position, from slices on a first axis."""

    top: Tensor  # the greatest logit, NaN if there is a NaN
    log_mass: Tensor  # log(sum(exp((logit - top) / temperature)))
    log_shares: Tensor  # [R, ...]: the log of each slice's share of the mass, -inf where it has no finite logit
    temperature: float
    broken: Tensor  # a NaN, a +inf, or no finite logit

    def logprobs(self, logits: Tensor) -> Tensor:
        """Of logits on the last axis, NaN where broken."""
        logprobs = (logits - self.top[..., None]) / self.temperature - self.log_mass[..., None]
        return logprobs.masked_fill(self.broken[..., None], torch.nan)

    def lse(self) -> Tensor:
        """As `torch.logsumexp`: NaN, +inf or -inf where broken."""
        return torch.where(self.broken, self.top, self.top / self.temperature + self.log_mass)


def softmax_of(tops: Tensor, log_masses: Tensor, temperature: float) -> Softmax:
    """Of whole rows, from each slice's greatest logit and log of its mass relative to that, `[R, ...]`."""
    top = tops.amax(0)  # a NaN is greater
    broken = ~top.isfinite()
    exists = tops.isfinite() & ~broken
    logs = torch.where(exists, (tops - top) / temperature + log_masses, -torch.inf)
    log_mass = logs.exp().sum(0).log()
    return Softmax(top, log_mass, logs - log_mass.masked_fill(broken, 0.0), temperature, broken)


def entropy(p: Softmax, entropies: Tensor) -> Tensor:
    """From those of the slices: their mean under the shares, and the entropy of the shares."""
    terms = torch.where(p.log_shares > -torch.inf, p.log_shares.exp() * (entropies - p.log_shares), 0.0)
    return terms.sum(0).clamp(min=0.0).masked_fill(p.broken, torch.nan)


def kl_divergence(p: Softmax, q: Softmax, divergences: Tensor) -> Tensor:
    """KL(p || q) from that of each slice: their mean under p's shares, and the divergence of the shares.

    +inf where that of a slice is, or q has no finite logit in a slice where p has one, even if p's share underflows.
    """
    p_exists, q_exists = (x.log_shares > -torch.inf for x in (p, q))
    terms = torch.where(
        p_exists & q_exists, p.log_shares.exp() * (divergences + p.log_shares - q.log_shares), 0.0
    ).masked_fill(p_exists & (~q_exists | (divergences == torch.inf)), torch.inf)
    return terms.sum(0).clamp(min=0.0).masked_fill(p.broken | q.broken, torch.nan)


def first_candidates(slices: Slices, k: int, logits: Tensor, *others: Tensor) -> list[Tensor]:
    """The first k of all slices' candidates `[R, ..., k']`: their logits, and of the others what belongs to them.

    Each slice's candidates are in order, and all that it has to offer.
    """
    counts = slices.counts(k)

    def together(of_ranks: Tensor) -> Tensor:
        return torch.cat([of_rank[..., :count] for of_rank, count in zip(of_ranks, counts, strict=True)], -1)

    first = order(together(logits), k)  # of equal logits, the one that stands first has the lower id
    return [together(x).gather(-1, first) for x in (logits, *others)]


def whole_rows(
    slices: Slices, k: int, temperature: float, topk_ids: Tensor, topk_logits: Tensor, log_mass: Tensor, *others: Tensor
) -> tuple[Softmax, list[Tensor]]:
    """Return the softmax of whole rows, and their candidates: logits, ids, and what else belongs to them."""
    softmax = softmax_of(topk_logits[..., 0], log_mass, temperature)
    return softmax, first_candidates(slices, k, topk_logits, topk_ids, *others)


def candidates_where(valid: Tensor, ids: Tensor) -> Tensor:
    """Candidates; where masked, the first ids."""
    return torch.where(valid[..., None], ids, torch.arange(ids.shape[-1], device=ids.device))


def local_ids(slices: Slices, ids: Tensor) -> Tensor:
    """Ids of the vocabulary as ids of this rank's slice, -1 for those of others."""
    local = ids.to(torch.int64) - slices.offset
    return torch.where((local >= 0) & (local < slices.width), local, -1)


def from_owners(slices: Slices, ids: Tensor, values: Tensor) -> Tensor:
    """Of values `[R, ...]` that belong to ids `[...]`, those of the ranks that hold the ids; where none does, any."""
    ends = torch.tensor(slices.ends, device=ids.device)
    owner = torch.bucketize(ids.to(torch.int64).contiguous(), ends, right=True).clamp(max=len(slices.ends) - 1)
    return values.gather(0, owner[None])[0]

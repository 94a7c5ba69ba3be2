"""What a row is, from what is known of each rank's slice of it.

A slice's softmax is told by its greatest logit, exact, and the log of its mass relative to that. Neither loses digits
in a row of strongly negative logits, as a log-sum-exp in float32 would, and all that follows is in float64.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas import Candidates, where_used
from ..formulas import topk_ids as order
from ._agreement import Slices
from ._exchange import Side


class Row(NamedTuple):
    """One model's whole rows, per position, from slices on a first axis."""

    topk_ids: Tensor  # [..., k]
    topk_logits: Tensor  # [..., k]
    others: Any  # [..., k]: the other model's logits of the candidates, if asked for
    top: Tensor  # the greatest logit, NaN if there is a NaN
    log_mass: Tensor  # log(sum(exp((logit - top) / temperature)))
    log_shares: Tensor  # [R, ...]: the log of each slice's share of the mass, -inf where it has no finite logit
    broken: Tensor  # a NaN, a +inf, or no finite logit
    temperature: float

    @property
    def slots(self) -> Tensor:
        """Return the candidates, -1 in empty slots."""
        return self.topk_ids.masked_fill(self.topk_logits == -torch.inf, -1)

    @property
    def candidates(self) -> Candidates:
        return Candidates(self.topk_ids, self.slots, self.logprobs(self.topk_logits), self.broken)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return those of logits on the last axis, NaN where broken."""
        logprobs = (logits - self.top[..., None]) / self.temperature - self.log_mass[..., None]
        return logprobs.masked_fill(self.broken[..., None], torch.nan)

    def lse(self) -> Tensor:
        """Return what `torch.logsumexp` does: NaN, +inf or -inf if broken."""
        return torch.where(self.broken, self.top, self.top / self.temperature + self.log_mass)

    def entropy(self, entropies: Tensor) -> Tensor:
        """Return the mean of the slices' entropies under the shares, plus the entropy of the shares."""
        exists = self.log_shares > -torch.inf
        terms = torch.where(exists, self.log_shares.exp() * (entropies - self.log_shares), 0.0)
        return terms.sum(0).clamp(min=0.0).masked_fill(self.broken, torch.nan)

    def state(self, used: Tensor, entropy: Tensor | None) -> Tensor:
        """Return what defines the softmax in a backward pass; see `formulas.row_state`."""
        mean = torch.zeros_like(self.top) if entropy is None else self.log_mass - entropy
        state = torch.stack([self.top, self.log_mass.exp(), mean], -1)
        return where_used(used, state.masked_fill(self.broken[..., None], torch.nan))


def whole_row(slices: Slices, k: int, temperature: float, side: Side, used: Tensor) -> Row:
    """Put a row together. Its candidates are the first k of all slices', which come in order; masked, the first ids."""
    top = side.topk_logits[..., 0].amax(0)  # a NaN is greater
    broken = ~top.isfinite()
    exists = side.topk_logits[..., 0].isfinite() & ~broken
    logs = torch.where(exists, (side.topk_logits[..., 0] - top) / temperature + side.log_mass, -torch.inf)
    log_mass = logs.exp().sum(0).log()
    log_shares = logs - log_mass.masked_fill(broken, 0.0)

    counts = slices.counts(k)
    first = order(_together(side.topk_logits, counts), k)  # of equal logits, what stands first has the lower id
    logits, ids = (_together(x, counts).gather(-1, first) for x in (side.topk_logits, side.topk_ids))
    ids = torch.where(used[..., None], ids, torch.arange(k, device=used.device))
    others = None if side.others is None else _together(side.others, counts).gather(-1, first)
    return Row(ids, logits, others, top, log_mass, log_shares, broken, temperature)


def _together(of_ranks: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([of_rank[..., :count] for of_rank, count in zip(of_ranks, counts, strict=True)], -1)


def kl_divergence(p: Row, q: Row, divergences: Tensor) -> Tensor:
    """Return KL(p || q): the mean of the slices' divergences under p's shares, plus the divergence of the shares.

    It is +inf if a slice's is, or if q has no finite logit in a slice where p has one, even if p's share underflows.
    """
    p_exists, q_exists = (x.log_shares > -torch.inf for x in (p, q))
    terms = torch.where(
        p_exists & q_exists, p.log_shares.exp() * (divergences + p.log_shares - q.log_shares), 0.0
    ).masked_fill(p_exists & (~q_exists | (divergences == torch.inf)), torch.inf)
    return terms.sum(0).clamp(min=0.0).masked_fill(p.broken | q.broken, torch.nan)


def local_ids(slices: Slices, ids: Tensor) -> Tensor:
    """Return ids of the vocabulary as ids of this rank's slice: those below 0 as they are, others' beyond its end."""
    local = ids.to(torch.int64) - slices.offset
    elsewhere = (local < 0) | (local > slices.width)
    return torch.where(ids < 0, -1, local.masked_fill(elsewhere, slices.width))


def from_owners(slices: Slices, ids: Tensor, values: Tensor) -> Tensor:
    """Return, of values `[R, ...]` for ids `[...]`, those of the ranks that hold the ids; any for other ids."""
    ends = torch.tensor(slices.ends, device=ids.device)
    owner = torch.bucketize(ids.to(torch.int64).contiguous(), ends, right=True).clamp(max=len(slices.ends) - 1)
    return values.gather(0, owner[None])[0]

"""What the response budget would have saved, replayed on responses that are already there."""

from typing import NamedTuple

import torch
from torch import Tensor

from pruneopd_kernels import ResponseBudget

STEPS = 100


class Replay(NamedTuple):
    """Where the budget settles on a set of responses."""

    length: float
    """The mean budget M over the second half of the replay, in tokens."""
    saved: float
    """The share of all tokens that lie beyond M, over the same steps: they would not have been sampled."""


def replay(effective_lengths: Tensor, lengths: Tensor, longest: int) -> Replay:
    """Steps a `ResponseBudget` as training would, with these responses as the batch of every step.

    A response cut at M keeps the effective length min(E, M), because E counts from the front. The budget starts at the
    longest length and moves between it and a quarter of it, in steps of a twentieth: the paper's rule (Algorithm 1,
    lines 12-19) at the scale of short responses.

    Args:
        effective_lengths: `[B]`: E of each response.
        lengths: `[B]`: the tokens of each response.
        longest: The most tokens that a response may have.
    """
    step = max(1, longest // 20)
    budget = ResponseBudget(initial=longest, minimum=max(1, longest // 4), maximum=longest, step=step, margin=step)
    budgets = [budget.length]
    for _ in range(STEPS):
        budgets.append(budget.update(effective_lengths.clamp(max=budget.length)))
    settled = torch.tensor(budgets[STEPS // 2 :])
    beyond = (lengths[None, :] - settled[:, None]).clamp_min(0).sum(1)
    return Replay(settled.double().mean().item(), (beyond / lengths.sum()).double().mean().item())

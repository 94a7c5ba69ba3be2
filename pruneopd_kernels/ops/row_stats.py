"""`row_stats` and `logprobs_backward`: the compiled passes over one model's rows, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._operator import Tensor, backward_pass, forward_pass, run_backward


@forward_pass
def row_stats(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    k: int = 0,
    entropy: bool = True,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> RowStats:
    """Compute log-probabilities of given ids and a row's own k most probable ids, reading each logit once.

    Without `entropy` its sum is left out, and the entropy is 0. An id below 0 has log-probability 0, one from
    vocab_size on has NaN.
    """
    ...


class RowStats(NamedTuple):
    """Of `row_stats`; floats are 0 where a position is masked, its ids 0 .. k-1."""

    logprobs: Tensor
    """float64 `[..., m]`: of the given ids."""
    entropy: Tensor
    """float32 per position."""
    lse: Tensor
    """float32 per position, as `torch.logsumexp` of the logits over their temperature."""
    topk_ids: Tensor
    """int64 `[..., k]`: the row's own candidates in order."""
    filled: Tensor
    """int32 per position: how many of these have a logit above -inf; the other slots are empty."""
    state: Tensor
    """float64 `[..., 3]`: a logit r, the sum of exp((x - r) / T), and the mean of (x - r) / T; NaN in a broken row."""


@backward_pass
def logprobs_backward(
    logits: Tensor,
    token_ids: Tensor,
    coefficients: Tensor,
    state: Tensor,
    entropy_coefficient: Tensor | None = None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute the gradient of `sum(coefficients * log p[token_ids]) + entropy_coefficient * entropy`.

    A row whose coefficients are all 0 is not read, and its gradient is 0. If the sum of the coefficients or the state
    is not finite, the gradient is NaN for every id that exists.
    """
    ...


def through_logprobs(gradient: Tensor, a: Any, topk_ids: Tensor, coefficients: Tensor) -> Tensor:
    """Return the student's gradient of a loss whose derivatives by log-probabilities are the coefficients."""
    import torch

    gradient = gradient[..., None]
    # Where nothing flows, even a NaN has no part.
    coefficients = torch.where(gradient == 0, 0.0, gradient * coefficients)
    state, temperature = a.state[..., :3], a.student_temperature
    tensors = a.student_logits, topk_ids, coefficients, state, None
    return run_backward("logprobs_backward", a.impl, *tensors, temperature=temperature, vocab_size=a.vocab_size)

"""`logprobs_backward`: the backward pass that losses over candidates share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._operator import backward_pass, run_backward

if TYPE_CHECKING:
    from torch import Tensor


@backward_pass
def logprobs_backward(
    student_logits: Tensor,
    topk_ids: Tensor,
    coefficients: Tensor,
    state: Tensor,
    scale: Tensor,
    *,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Compute the gradient of `scale * sum(coefficients * log p[topk_ids])`."""
    ...


def through_logprobs(gradient: Tensor, saved: Any, a: Any, topk_ids: Tensor) -> Tensor:
    """Return the gradient of a loss that saved its derivatives by the candidates' log-probabilities."""
    return run_backward("logprobs_backward", a, a.student_logits, topk_ids, *saved, gradient)

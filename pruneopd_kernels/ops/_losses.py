"""The backward pass that losses over candidates share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._registration import OPS, Outputs, register_backward


def saved_type(impl: str) -> torch.dtype:
    """The dtype of what a forward pass saves: the reference computes in float64, and rounds nothing on the way."""
    return torch.float64 if impl == "reference" else torch.float32


def through_logprobs(
    gradient: Tensor, saved: Outputs, *, student_logits: Tensor, topk_ids: Tensor, student_temperature: float = 1.0,
    vocab_size: int | None = None, impl: str = "auto", **_: Any,
) -> Tensor:  # fmt: skip
    """The gradient of a loss by the logits, from its derivatives by the log-probabilities of candidates."""
    coefficients, state = saved
    return OPS._logprobs_backward(  # type: ignore[no-any-return]
        student_logits, topk_ids, coefficients, state, gradient,
        student_temperature=student_temperature, vocab_size=vocab_size, impl=impl,
    )  # fmt: skip


register_backward("logprobs_backward")

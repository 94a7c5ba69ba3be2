"""The gradient of a loss by autograd, and what it is where a loss is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(loss_of: Callable[[Tensor], Tensor], student_logits: Tensor, vocab_size: int | None) -> Tensor:
    """`loss_of(student_logits)`, with a gradient of NaN for every id that exists where the loss is not finite.

    What autograd makes of such a row depends on how its formula is written down.
    """
    x = student_logits[..., :vocab_size]
    with torch.no_grad():
        loss = loss_of(x.detach())
    spoilt = ~loss.isfinite()
    finite = loss_of(torch.where(spoilt[..., None], 0.0, x))  # whose gradient stops at what is replaced
    return torch.where(spoilt, loss, finite) + _NanGradient.apply(x, loss, spoilt)  # type: ignore[no-any-return, no-untyped-call]


class _NanGradient(torch.autograd.Function):
    """0 like `loss`, with a gradient of NaN by the rows of x that are spoilt; but of 0 where nobody asks for one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, spoilt: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, _, spoilt = inputs
        ctx.save_for_backward(spoilt)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (spoilt,) = ctx.saved_tensors
        rows = torch.where(spoilt & (gradient != 0), torch.nan, 0.0)
        return rows[..., None].to(ctx.dtype).expand(ctx.shape), None, None

"""What the losses share: the gradient by autograd, and parts of the backward passes that do without autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(loss_of: Callable[[Tensor], Tensor], student_logits: Tensor, vocab_size: int | None) -> Tensor:
    """Return `loss_of(student_logits)`, whose gradient is NaN for every id that exists if the loss is not finite.

    Autograd's own gradient of such a row would depend on how the formula is written.
    """
    x = student_logits[..., :vocab_size]
    with torch.no_grad():
        loss = loss_of(x.detach())
    spoilt = ~loss.isfinite()
    finite = loss_of(torch.where(spoilt[..., None], 0.0, x))  # no gradient reaches a row that is replaced
    return torch.where(spoilt, loss, finite) + NanGradient.apply(x, loss, spoilt)  # type: ignore[no-any-return, no-untyped-call]


class NanGradient(torch.autograd.Function):
    """Zeros like `loss`, which may have several values a row. The gradient is NaN for the spoilt rows of x.

    Where each incoming gradient is 0, so is that of the row. A sum of them may be 0 and does not count.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, spoilt: Tensor) -> Tensor:
        return torch.zeros_like(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, loss, spoilt = inputs
        ctx.slots = loss.shape[spoilt.ndim :]
        ctx.save_for_backward(spoilt)
        ctx.save_for_forward(spoilt)
        ctx.shape, ctx.dtype = x.shape, x.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (spoilt,) = ctx.saved_tensors
        flows = (gradient != 0).any(-1) if ctx.slots else gradient != 0
        rows = torch.where(spoilt & flows, torch.nan, 0.0)
        return rows[..., None].to(ctx.dtype).expand(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Tensor:
        (spoilt,) = ctx.saved_tensors
        rows = torch.where(spoilt & (tangent != 0).any(-1), torch.nan, 0.0).to(ctx.dtype)
        return rows[..., None].expand(*spoilt.shape, *ctx.slots) if ctx.slots else rows


def probabilities(logits: Tensor, state: Tensor, used: Tensor, size: int, temperature: float) -> Tensor:
    """Return the softmax of each row from its state."""
    reference, mass = state[..., :1].to(torch.float64), state[..., 1:2].to(torch.float64)
    x = torch.where(used[..., None], logits[..., :size].to(torch.float64), 0.0)
    return ((x - reference) / temperature).exp() / mass


def full_width(logits: Tensor, gradient: Tensor, used: Tensor) -> Tensor:
    """Return the gradient in the shape and dtype of the logits: 0 in rows that are not used and beyond vocab_size."""
    gradient = torch.where(used[..., None], gradient, 0.0).to(logits.dtype)
    return torch.nn.functional.pad(gradient, (0, logits.shape[-1] - gradient.shape[-1])).contiguous()

"""Outputs that are differentiable in this rank's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..dispatch.registration import save_tensors, saved_tensors
from ..ops import Operator
from ._passes import Split


def with_gradient(passes: Split, op: Operator, a: Any, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the operator's outputs, the differentiable ones with their gradient by this rank's logits."""
    fields = list(outputs[: len(op.fields)])
    if not op.saved:
        return fields
    scalars = {name: getattr(a, name) for name in op.scalars}
    given = a._asdict() | dict(zip((*op.fields, *op.saved), outputs, strict=True))
    kept = {name: given[name] for name in op.module.kept(SimpleNamespace(**scalars))}

    def gradient_of(kept: dict[str, Any], *gradients: Tensor | None) -> Tensor:
        return passes.gradient(op.name, SimpleNamespace(**scalars, **kept), *gradients)

    at = [op.fields.index(name) for name in op.differentiable]
    linked = _Linked.apply(a[0], gradient_of, kept, *(fields[i] for i in at))  # type: ignore[no-untyped-call]
    for i, output in zip(at, linked, strict=True):
        fields[i] = output
    return fields


class _Linked(torch.autograd.Function):
    """The outputs, linked to the logits by `gradient_of(kept, *gradients)`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, gradient_of: Callable[..., Tensor], kept: dict[str, Any], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        save_tensors(ctx, kept)
        ctx.gradient_of, ctx.others = gradient_of, 2 + len(outputs)
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        none: list[None] = [None] * ctx.others
        if all(gradient is None for gradient in gradients):
            return None, *none
        return ctx.gradient_of(saved_tensors(ctx), *gradients), *none

"""The gradient of one rank's slice.

Every rank has the same loss, and saves the same of the whole row. So each rank computes the gradient of its slice by
itself, with the backward passes for whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops import Operator
from ._agreement import Slices
from ._rows import local_ids


def with_gradient(slices: Slices, op: Operator, a: Any, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the operator's outputs, the differentiable ones with their gradient by this rank's logits."""
    fields = list(outputs[: len(op.fields)])
    if not op.saved:
        return fields
    scalars = {name: getattr(a, name) for name in op.scalars} | {"impl": slices.impl, "vocab_size": slices.width}
    given = a._asdict() | dict(zip((*op.fields, *op.saved), outputs, strict=True))
    names = op.module.kept(SimpleNamespace(**scalars))
    # Candidates of other ranks count in the sum of the coefficients, and have no logit here.
    kept = [local_ids(slices, given[name]) if name.endswith("_ids") else given[name] for name in names]

    def gradient_of(kept: Sequence[Any], *gradients: Tensor | None) -> Tensor:
        if slices.width == 0:
            return torch.zeros_like(kept[0])
        return op.module.backward(SimpleNamespace(**scalars, **dict(zip(names, kept, strict=True))), *gradients)  # type: ignore[no-any-return]

    at = [op.fields.index(name) for name in op.differentiable]
    linked = _Linked.apply(a[0], gradient_of, len(at), *(fields[i] for i in at), *kept)  # type: ignore[no-untyped-call]
    for i, output in zip(at, linked, strict=True):
        fields[i] = output
    return fields


class _Linked(torch.autograd.Function):
    """The outputs, linked to the logits by `gradient_of(kept, *gradients)`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, gradient_of: Callable[..., Tensor], count: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        outputs, kept = tensors[:count], tensors[count:]
        # Inference tensors cannot be saved for backward; they are immutable, so a plain reference is enough.
        is_saved = [x is not None and not x.is_inference() for x in kept]
        ctx.save_for_backward(*(x if saved else None for x, saved in zip(kept, is_saved, strict=True)))
        ctx.unsaved = [None if saved else x for x, saved in zip(kept, is_saved, strict=True)]
        ctx.gradient_of, ctx.others = gradient_of, 2 + len(tensors)
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        none: list[None] = [None] * ctx.others
        if all(gradient is None for gradient in gradients):
            return None, *none
        pairs = zip(ctx.saved_tensors, ctx.unsaved, strict=True)
        kept = [unsaved if saved is None else saved for saved, unsaved in pairs]
        return ctx.gradient_of(kept, *gradients), *none

"""The backward pass: gradients that the forward pass has formed, or logits that are computed again."""

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from ..dispatch.registration import save_tensors, saved_tensors
from ..ops import OPERATORS
from ._chunks import Sides
from ._positions import take
from ._products import Gradients, Optional, unit_of

INPUTS = ("hidden", "weight", "bias")
Rows = dict[str, Tensor]
Saved = dict[str, Tensor | None]


def inputs_of(a: Any, prefix: str) -> list[Tensor | None]:
    """Return one model's hidden states, weight and bias."""
    return [getattr(a, prefix + name) for name in INPUTS]


def wanted_of(inputs: Sequence[Tensor | None]) -> list[bool]:
    """Return which inputs get a gradient."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def add_chunk(
    gradients: Gradients, op: str, a: Any, sides: Sides, places: Tensor, kept: Rows, hidden: Tensor, logits: Rows,
    *of_outputs: Tensor | None,
) -> None:  # fmt: skip
    """Add a chunk's gradients, from those by the operator's outputs."""
    gradient = a.passes.gradient(op, SimpleNamespace(**a._asdict() | logits | kept), *of_outputs)
    gradients.add(sides.head, places, hidden, gradient, next(iter(logits.values())))


def with_formed(a: Any, gradients: Gradients, loss: Tensor) -> Tensor:
    """Return the loss of `reduction="sum"`: its backward pass gives the gradients away."""
    op, passes = a.op, a.passes  # keep no tensor alive

    def backward(inputs: Any, saved: Any, wanted: Any, gradient: Tensor) -> Optional:
        if gradients.sums is None:
            raise RuntimeError(
                f"{op}: reduction='sum' gives its gradients away in one backward pass; for a second one, as with "
                "retain_graph=True, use reduction='none'"
            )
        return gradients.give_up(passes, gradient)

    return attach(op, inputs_of(a, "student_"), backward, {}, loss)[0]


def with_recomputed(
    op: str, a: Any, prefix: str, chunks: Sequence[tuple[Tensor, Rows]], *outputs: Tensor
) -> tuple[Tensor, ...]:
    """Return the outputs: their backward pass computes logits again, as far as the operator's gradient needs them.

    `chunks` are places and what the operator keeps of them.
    """
    places, kept = zip(*chunks, strict=True)
    saved: Saved = {name: torch.cat([rows[name] for rows in kept]) for name in kept[0]}
    saved["places"] = torch.cat(places)
    tensors = dict.fromkeys(name for name, x in a._asdict().items() if isinstance(x, Tensor))
    if "teacher_logits" in OPERATORS[op].module.kept(a):
        saved |= {f"teacher_{name}": x for name, x in zip(INPUTS, inputs_of(a, "teacher_"), strict=True)}
    backward = functools.partial(_recompute, op, a._replace(**tensors), prefix)
    return attach(a.op, inputs_of(a, prefix), backward, saved, *outputs)


def _recompute(
    op: str, a: Any, prefix: str, inputs: Sequence[Tensor], kept: Rows, wanted: Sequence[bool], *gradients: Any
) -> Optional:
    given = {prefix + name: x for name, x in zip(INPUTS, inputs, strict=True)}
    given |= {name: kept.pop(name) for name in [*kept] if name.startswith("teacher_") and name.endswith(INPUTS)}
    a, places = a._replace(**given), kept.pop("places")
    rows = [None if x is None else take(x, places) for x in gradients]
    formed, sides = Gradients(inputs, wanted, unit_of(*rows)), Sides(a)
    rows = [None if x is None else x / formed.unit for x in rows]
    for start in range(0, len(places), a.chunk_size):
        chunk = slice(start, start + a.chunk_size)
        of_chunk = {name: x[chunk] for name, x in kept.items()}
        flowing = (None if x is None else x[chunk] for x in rows)
        add_chunk(formed, op, a, sides, places[chunk], of_chunk, *sides.logits(places[chunk]), *flowing)
    del sides  # the chunks' memory, before the gradients are rounded
    return formed.give_up(a.passes)


def attach(
    op: str, inputs: Sequence[Tensor | None], backward: Callable[..., Optional], saved: Saved, *outputs: Tensor
) -> tuple[Tensor, ...]:
    """Return existing outputs; `backward(inputs, saved, wanted, *gradients)` returns the gradients of the inputs."""
    return cast(tuple[Tensor, ...], _Attached.apply(op, backward, saved, outputs, *inputs))  # type: ignore[no-untyped-call]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: str, backward: Callable[..., Optional], saved: Saved, outputs: tuple[Tensor, ...],
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        save_tensors(ctx, saved | {str(i): x for i, x in enumerate(inputs)})
        ctx.op, ctx.backward_pass = op, backward
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Optional:
        saved = saved_tensors(ctx)  # read once: checkpointing computes them again
        inputs = [saved.pop(str(i)) for i in range(len(ctx.needs_input_grad[4:]))]
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            found = ctx.backward_pass(inputs, saved, ctx.needs_input_grad[4:], *gradients)
        if torch.is_grad_enabled():  # create_graph=True
            found = _Refusal.apply(ctx.op, len(inputs), *inputs, *found)  # type: ignore[no-untyped-call]
        return None, None, None, None, *found


class _Refusal(torch.autograd.Function):
    """Gradients that refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, inputs: int, *tensors: Tensor | None) -> Optional:
        ctx.op = op
        return tensors[inputs:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{ctx.op}: the gradient of a loss cannot be differentiated a second time")

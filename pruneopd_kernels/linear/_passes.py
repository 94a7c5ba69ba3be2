"""The two passes of a loss: which of them forms the gradients, and from what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._forward import Fields, Logits, Problem, Side, computed_chunks, positions_of
from ._positions import put, take
from ._products import Head, add_bias_gradient, add_weight_gradient, head_of, sum_dtype, without_autocast
from ._scoring import Terms, logits_gradient

OP = "linear_opd_loss"
Optional = tuple[Tensor | None, ...]


class Gradients:
    """Of the student's hidden states, weight and bias, where wanted; formed chunk by chunk."""

    def __init__(self, inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        self.dtypes = [None if x is None else x.dtype for x in inputs]
        hidden, weight, bias = (x if want else None for x, want in zip(inputs, wanted, strict=True))
        self.hidden = None if hidden is None else hidden.new_zeros(hidden.shape)
        self.weight, self.bias = (
            None if x is None else x.new_zeros(x.shape, dtype=sum_dtype(x.dtype)) for x in (weight, bias)
        )

    def add(self, head: Head, places: Tensor, hidden: Tensor, gradient: Tensor, student_logits: Tensor) -> None:
        """Add a chunk's gradients, from the gradient by its logits. The logits' memory is used again."""
        if self.bias is not None:
            add_bias_gradient(self.bias, gradient)
        gradient = head.operand(gradient, student_logits)
        if self.hidden is not None:
            put(self.hidden, places, head.hidden_gradient(gradient))
        if self.weight is not None:
            add_weight_gradient(self.weight, gradient, hidden)

    def give_up(self, factor: Tensor | None = None) -> Optional:
        """Return the gradients times a factor, in place, in the dtypes of the inputs; keep none."""
        gradients = [self.hidden, self.weight, self.bias]
        self.hidden = self.weight = self.bias = None
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                gradient = gradient if factor is None else gradient.mul_(factor)
                gradients[place] = gradient.to(self.dtypes[place])
        return tuple(gradients)


class Saved(NamedTuple):
    """What the backward pass of `reduction="none"` starts from, of each position that is part of the loss."""

    places: Tensor
    weight: Tensor  # this and what follows as in `Terms`
    state: Tensor
    ids: Tensor | None
    coefficients: Tensor | None


class Forward(NamedTuple):
    fields: Fields
    loss: Tensor
    gradients: Gradients | None  # of `reduction="sum"`
    saved: Saved | None  # of `reduction="none"`


def forward_pass(problem: Problem, inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> Forward:
    a, positions = problem.a, positions_of(problem)
    fields, kept = Fields(positions.shape), []
    gradients = Gradients(inputs, wanted) if a.reduction == "sum" and any(wanted) else None
    scale = torch.ones((), device=problem.student.hidden.device, dtype=torch.float64) if a.scale is None else a.scale
    for computed in computed_chunks(problem, positions):
        fields.put_computed(computed, problem.dtype)
        terms, places = computed.scored.terms, computed.chunk.places
        assert terms is not None
        if gradients is not None:
            factor = take(scale.expand(positions.shape), places).to(terms.loss.dtype)
            student, teacher = computed.student_logits, computed.teacher_logits
            by_logits = logits_gradient(terms, factor, student, teacher, a)
            gradients.add(problem.student.head, places, computed.hidden, by_logits, student)
            del by_logits  # before the next chunk's exists
        elif any(wanted):
            rows = Saved(places, *terms[1:])
            kept.append(rows if computed.counted is None else _rows(rows, computed.counted.nonzero().squeeze(1)))
    loss = fields["loss"]
    if a.reduction == "sum":
        factor = scale.to(torch.float64)
        loss = torch.where(fields["counted"] & (factor != 0), factor * loss, 0.0).sum().to(loss.dtype)
    saved = None
    if kept:
        saved = Saved(*(None if x[0] is None else torch.cat(x) for x in zip(*kept, strict=True)))  # type: ignore[arg-type]
    return Forward(fields, loss, gradients, saved)


def add_all_chunks(
    gradients: Gradients, student: Side, teacher: Side | None, saved: Saved, gradient: Tensor, chunk_size: int, a: Any
) -> None:
    """Compute the logits again, chunk by chunk, as far as their gradient needs them."""
    count = len(saved.places)
    student_memory = Logits(student, chunk_size, count)
    teacher_memory = None if teacher is None else Logits(teacher, chunk_size, count)
    for start in range(0, count, chunk_size):
        places, *terms = _rows(saved, slice(start, start + chunk_size))
        hidden, student_logits = student_memory.of(places)
        teacher_logits = None if teacher_memory is None else teacher_memory.of(places)[1]
        factor = take(gradient, places)
        by_logits = logits_gradient(Terms(factor, *terms), factor, student_logits, teacher_logits, a)
        gradients.add(student.head, places, hidden, by_logits, student_logits)
        del by_logits  # before the next chunk's exists


def _rows(saved: Saved, rows: Tensor | slice) -> Any:
    return Saved(*(None if x is None else x[rows] for x in saved))  # type: ignore[arg-type]


# --- for autograd -------------------------------------------------------------------------------------------------


class FormedInForward(torch.autograd.Function):
    """`reduction="sum"`: the gradients exist already, and are given away once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, formed: Forward) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.gradients = formed.gradients
        return formed.loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Optional:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                f"{OP}: reduction='sum' gives its gradients away in one backward pass; for a second one, as with "
                "retain_graph=True, use reduction='none'"
            )
        with torch.no_grad():
            found = gradients.give_up(gradient)
        return *_final(ctx, found), None


class FormedInBackward(torch.autograd.Function):
    """`reduction="none"`: the logits are computed again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, formed: Forward, problem: Problem,
        teacher: Optional, autocast: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        assert formed.saved is not None
        # Inference tensors cannot be saved for backward; they are immutable, so a plain reference is enough.
        ctx.unsaved = [x if x is not None and x.is_inference() else None for x in teacher]
        watched = [x if y is None else None for x, y in zip(teacher, ctx.unsaved, strict=True)]
        ctx.save_for_backward(hidden, weight, bias, *formed.saved, *watched)
        ctx.chunk_size, ctx.autocast = problem.chunk_size, autocast
        tensors = [name for name, x in problem.a._asdict().items() if isinstance(x, Tensor)]
        ctx.arguments = problem.a._replace(**dict.fromkeys(tensors))  # the backward pass needs the scalars
        return formed.loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Optional:
        kept = ctx.saved_tensors  # read once: checkpointing computes them again
        inputs, saved, watched = kept[:3], Saved(*kept[3:8]), kept[8:]
        teacher = [x if y is None else y for x, y in zip(watched, ctx.unsaved, strict=True)]
        with torch.no_grad(), without_autocast(gradient):
            student, *other = (
                Side(hidden, head_of(weight, bias, ctx.autocast))
                for hidden, weight, bias in filter(None, (inputs, teacher))
            )
            gradients = Gradients(inputs, ctx.needs_input_grad[:3])
            teacher_side = other[0] if other else None
            add_all_chunks(gradients, student, teacher_side, saved, gradient, ctx.chunk_size, ctx.arguments)
            found = gradients.give_up()  # now that the chunks' memory is free again
        return *_final(ctx, found), None, None, None, None


def _final(ctx: Any, gradients: Optional) -> Optional:
    """Return the gradients; under `create_graph=True`, ones that refuse to be differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    return cast(Optional, _Refusal.apply(*ctx.saved_tensors[:3], *gradients))  # type: ignore[no-untyped-call]


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Optional:
        return tensors[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{OP}: the gradient of a loss cannot be differentiated a second time")

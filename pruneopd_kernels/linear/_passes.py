"""The two passes of a loss: which of them forms the gradients, and from what."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ._forward import Fields, Logits, Problem, Side, computed_chunks, positions_of
from ._positions import put, take
from ._products import Head, add_bias_gradient, add_weight_gradient, head_of, sum_dtype, without_autocast
from ._scoring import Arguments, Terms, logits_gradient

OP = "linear_opd_loss"
Inputs = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight, bias
Wanted = tuple[bool, bool, bool]  # which of these want a gradient


class Gradients:
    """Of the student's hidden states, weight and bias, as far as they are wanted; formed chunk by chunk."""

    def __init__(self, inputs: Inputs, wanted: Wanted) -> None:
        self.leading = inputs[0].ndim - 1
        self.dtypes = [None if x is None else x.dtype for x in inputs]
        hidden, weight, bias = (x if want else None for x, want in zip(inputs, wanted, strict=True))
        self.hidden = None if hidden is None else hidden.new_zeros(hidden.shape)
        self.weight = None if weight is None else weight.new_zeros(weight.shape, dtype=sum_dtype(weight.dtype))
        self.bias = None if bias is None else bias.new_zeros(bias.shape, dtype=sum_dtype(bias.dtype))

    def add(self, head: Head, places: Tensor, hidden: Tensor, gradient: Tensor, student_logits: Tensor) -> None:
        """From a chunk's gradient by its logits; these are needed no more and are written over."""
        if self.bias is not None:
            add_bias_gradient(self.bias, gradient)
        gradient = head.operand(gradient, student_logits)
        if self.hidden is not None:
            put(self.hidden, places, head.hidden_gradient(gradient), self.leading)
        if self.weight is not None:
            add_weight_gradient(self.weight, gradient, hidden)

    def give_up(self, factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The gradients times a factor, in place, then in the dtypes of what they are of; nothing is left here."""
        gradients = [self.hidden, self.weight, self.bias]
        self.hidden = self.weight = self.bias = None
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                gradient = gradient if factor is None else gradient.mul_(factor)
                gradients[place] = gradient.to(self.dtypes[place])
        return tuple(gradients)


class Saved(NamedTuple):
    """What the backward pass of `reduction="none"` starts from, of each position that has a part in the loss."""

    places: Tensor  # [M]
    weight: Tensor  # [M], and the others as in `Terms`
    state: Tensor
    ids: Tensor | None
    coefficients: Tensor | None


class Forward(NamedTuple):
    fields: Fields
    loss: Tensor
    gradients: Gradients | None  # of `reduction="sum"`
    saved: Saved | None  # of `reduction="none"`


def forward_pass(problem: Problem, inputs: Inputs, wanted: Wanted, reduction: str, scale: Tensor | None) -> Forward:
    positions = positions_of(problem)
    fields = Fields(problem, positions)
    forms = reduction == "sum" and any(wanted)
    keeps = reduction == "none" and any(wanted)
    gradients = Gradients(inputs, wanted) if forms else None
    kept: list[Saved] = []
    for computed in computed_chunks(problem, positions):
        fields.put(computed)
        terms, chunk = computed.scored.terms, computed.chunk
        assert terms is not None
        if gradients is not None:
            factor = _at(scale, terms.loss, chunk.places, problem.leading)
            student, teacher = computed.student_logits, computed.teacher_logits
            by_logits = logits_gradient(terms, factor, student, teacher, problem.arguments)
            gradients.add(problem.student.head, chunk.places, computed.hidden, by_logits, student)
            del by_logits  # before the next chunk's exists
        if keeps:
            kept.append(_only_counted(Saved(chunk.places, *terms[1:]), computed.counted))
    loss = fields.loss
    if reduction == "sum":
        factor = torch.ones((), dtype=torch.float64, device=loss.device) if scale is None else scale.to(torch.float64)
        loss = torch.where(fields.counted & (factor != 0), factor * loss, 0.0).sum().to(loss.dtype)
    return Forward(fields, loss, gradients, _joined(kept, problem) if keeps else None)


def backward_pass(
    student: Side, teacher: Side | None, inputs: Inputs, wanted: Wanted, saved: Saved, gradient: Tensor,
    chunk_size: int, arguments: Arguments,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Compute the logits again, chunk by chunk, as far as their gradient needs them."""
    gradients = Gradients(inputs, wanted)
    _add_all_chunks(gradients, student, teacher, saved, gradient, chunk_size, arguments)
    return gradients.give_up()  # now that the chunks' memory is free again


def _add_all_chunks(
    gradients: Gradients, student: Side, teacher: Side | None, saved: Saved, gradient: Tensor, chunk_size: int,
    arguments: Arguments,
) -> None:  # fmt: skip
    leading, count = student.hidden.ndim - 1, len(saved.places)
    student_memory = Logits(student, chunk_size, count, leading)
    teacher_memory = None if teacher is None else Logits(teacher, chunk_size, count, leading)
    for start in range(0, count, chunk_size):
        rows = slice(start, start + chunk_size)
        places, *rest = (None if x is None else x[rows] for x in saved)
        assert places is not None
        hidden, student_logits = student_memory.of(places)
        teacher_logits = None if teacher_memory is None else teacher_memory.of(places)[1]
        factor = take(gradient, places, leading)
        terms = Terms(factor, *cast(Any, rest))
        by_logits = logits_gradient(terms, factor, student_logits, teacher_logits, arguments)
        gradients.add(student.head, places, hidden, by_logits, student_logits)
        del by_logits  # before the next chunk's exists


def _at(scale: Tensor | None, like: Tensor, index: Tensor, leading: int) -> Tensor:
    """The scale of each position of a chunk."""
    if scale is None:
        return torch.ones_like(like)
    return scale.to(like.dtype).expand(like.shape) if scale.ndim == 0 else take(scale, index, leading).to(like.dtype)


def _only_counted(saved: Saved, counted: Tensor | None) -> Saved:
    if counted is None:
        return saved
    kept = counted.nonzero().squeeze(1)
    return Saved(*(None if x is None else x[kept] for x in saved))  # type: ignore[arg-type]


def _joined(kept: list[Saved], problem: Problem) -> Saved:
    if not kept:
        hidden = problem.student.hidden
        nothing = hidden.new_empty(0)
        return Saved(nothing.to(torch.int64), nothing, nothing.view(0, 1), None, None)
    return Saved(*(None if x[0] is None else torch.cat(x) for x in zip(*kept, strict=True)))  # type: ignore[arg-type]


# --- for autograd -------------------------------------------------------------------------------------------------


class FormedInForward(torch.autograd.Function):
    """`reduction="sum"`: the gradients exist already, and are given away once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, formed: Forward) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.gradients = formed.gradients
        return formed.loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
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
        teacher: Inputs | None, autocast: torch.dtype | None,
    ) -> Tensor:  # fmt: skip
        assert formed.saved is not None
        # What comes from inference mode cannot be saved, and needs not be watched for changes: nobody may make any.
        ctx.unsaved = [x if x is not None and x.is_inference() else None for x in teacher or ()]
        watched = [x if y is None else None for x, y in zip(teacher or (), ctx.unsaved, strict=True)]
        ctx.save_for_backward(hidden, weight, bias, *formed.saved, *watched)
        ctx.chunk_size, ctx.arguments, ctx.autocast = problem.chunk_size, problem.arguments, autocast
        return formed.loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # asked for once: checkpointing computes them again
        inputs, saved, watched = kept[:3], Saved(*kept[3:8]), kept[8:]
        teacher = [x if y is None else y for x, y in zip(watched, ctx.unsaved, strict=True)]
        with torch.no_grad(), without_autocast(gradient):
            found = backward_pass(
                Side(inputs[0], head_of(inputs[1], inputs[2], ctx.autocast)),
                Side(teacher[0], head_of(teacher[1], teacher[2], ctx.autocast)) if teacher else None,
                inputs, ctx.needs_input_grad[:3], saved, gradient, ctx.chunk_size, ctx.arguments,
            )  # fmt: skip
        return *_final(ctx, found), None, None, None, None


def _final(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that can be used, and under `create_graph=True` refuse to be differentiated."""
    if not torch.is_grad_enabled():
        return gradients
    return cast(tuple[Tensor | None, ...], _Refusal.apply(*ctx.saved_tensors[:3], *gradients))  # type: ignore[no-untyped-call]


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{OP}: the gradient of a loss cannot be differentiated a second time")

"""`linear_opd_loss`: a loss of on-policy distillation weighted by reliability, from hidden states and heads."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import checks
from ..checks import Tail
from ..formulas import weighted
from ._checks import is_from_server
from ._chunks import Fields, Sides, scored_chunks
from ._declaration import from_hidden_states, outside_graphs
from ._gradients import add_chunk, inputs_of, wanted_of, with_formed, with_recomputed
from ._positions import take
from ._products import Gradients, unit_of

Loss = Literal["topk_policy", "reverse_kl", "topk_forward_kl"]
Reduction = Literal["none", "sum"]


class LinearOpdLoss(NamedTuple):
    """Of `linear_opd_loss`: a loss, and then the fields of `Reliability`."""

    loss: Tensor
    """float32 per position, or 0-d for `reduction="sum"`: weighted; differentiable."""
    entropy: Tensor
    """float32 per position: of the student's distribution, in nats."""
    overlap: Tensor
    drift: Tensor
    drift_count: Tensor
    reliability: Tensor
    weight: Tensor
    effective_length: Tensor
    topk_ids: Tensor
    rewards: Tensor


@from_hidden_states("reliability")
def linear_opd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_logprobs: Tensor | None = None,
    chunk_size: int | None = None,
    loss: Loss = "topk_policy",
    reduction: Reduction = "none",
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    tail: Tail = "bucket",
    skip_exhausted: bool = False,
    **arguments: Any,
) -> LinearOpdLoss:
    """Compute a loss weighted by reliability, with at most `chunk_size` positions of logits alive.

    With L and the rewards r of `linear_reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12, 14-16), at each position

        topk_policy:      topk_policy_loss with advantages L * r, on-policy
        reverse_kl:       L * KL(student || teacher)
        topk_forward_kl:  L * topk_forward_kl, over the teacher's k candidates

    Positions are taken chunk by chunk in time order, so a chunk's weights are known when its gradient is formed. Logits
    and their gradient exist for one chunk at a time. The student's logits are read twice, the teacher's once (twice for
    `"reverse_kl"`). With `reduction="sum"` the forward pass forms the gradients: four products per position (student,
    teacher, hidden states, head). With `"none"` the backward pass computes the student's logits again, for
    `"reverse_kl"` also the teacher's. Gradients are summed in float32 and rounded to their tensors' dtypes at the end.
    Autocast, masks and the order of positions are as in `linear_reliability`.

    For `loss="topk_forward_kl"`, `teacher_topk_ids` and `teacher_topk_logprobs`, as a server sends them, may take the
    place of the teacher's hidden states and weight. Then the overlap is that of both top-k, and the rewards cover the
    candidates of both (the strategy `"intersection"` of `opd_rewards`), weighted by L.

    Args:
        teacher_topk_ids: int32 or int64 `[..., k]`: a server's candidates, the most probable first for
            `metric="top_p"`. A slot with an id below 0 or a log-probability of -inf is empty.
        teacher_topk_logprobs: float `[..., k]`: their log-probabilities, in nats.
        loss: `"topk_policy"`, `"reverse_kl"` or `"topk_forward_kl"`.
        reduction: `"none"`: the loss of each position; `"sum"`: `sum(scale * loss)`, whose gradients can be fetched by
            one backward pass. They are multiplied by the incoming gradient before they are rounded.
        scale: float, 0-d or one per position, for `reduction="sum"`, such as 1 over the number of valid positions; if
            it is 0 the loss has no part. It gets no gradient. None: 1.
        weight: float `[B, T]` or `[N]`: what multiplies rewards and loss. None: L.
        tail: What `"topk_forward_kl"` adds for ids outside the candidates: `"bucket"`, `"generalised"` or `"none"`.
        skip_exhausted: Once a response's R has reached 0 its later positions are treated as masked, with the count
            carried, regardless of the chunks, and make no further products. Needs `w_base=0`. On a GPU each chunk is
            waited for.

    Returns:
        The fields of `LinearOpdLoss`. `loss` alone is differentiable, once, in `student_hidden`, `student_weight` and
        `student_bias`. Gradients have their tensors' dtypes.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import linear_opd_loss
        >>> hidden, head = torch.randn(2, 5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True)
        >>> out = linear_opd_loss(hidden, head, torch.randn(2, 5, 8), head.detach(), k=4, loss="reverse_kl")
        >>> out.loss.shape
        torch.Size([2, 5])
        >>> out.loss.mean().backward()
        >>> hidden.grad.shape, head.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([100, 8]))
    """
    ...


def check(op: str, a: Any) -> None:
    losses = get_args(Loss)
    checks.one_of(op, "loss", a.loss, losses)
    if is_from_server(a) and a.loss != losses[-1]:
        checks.bad_value(op, "loss", f"be {losses[-1]!r} when teacher_topk_ids are given", repr(a.loss))
    checks.one_of(op, "reduction", a.reduction, get_args(Reduction))
    shape = a.student_hidden.shape[:-1]
    checks.has_one_for_each(op, "weight", a.weight, a.student_hidden, shape)
    if a.scale is not None:
        if a.reduction == "none":
            checks.bad_value(op, "scale", "be None when reduction is 'none'", f"shape {list(a.scale.shape)}")
        if a.scale.ndim != 0 and a.scale.shape != shape:
            checks.bad_value(op, "scale", f"have shape [] or {list(shape)}", list(a.scale.shape))
        checks.has_one_for_each(op, "scale", a.scale, a.student_hidden, a.scale.shape)
    if a.skip_exhausted and a.w_base != 0:
        checks.bad_value(op, "w_base", "be 0 when skip_exhausted is True", a.w_base)


def compute(a: Any) -> LinearOpdLoss:
    found = results(a)
    return LinearOpdLoss(**{name: found[name] for name in LinearOpdLoss._fields})


@outside_graphs
def linear_opd_results(**arguments: Any) -> Any:
    """Return all that `linear_opd_loss` finds, by name; the trainers of `integrations` log it."""
    return linear_opd_loss.declared.run(results, **arguments)  # type: ignore[attr-defined]


def results(a: Any) -> dict[str, Tensor]:
    """Return all that is found, by name; also `accepted` and `teacher_entropy` if there are a teacher's logits."""
    inputs = inputs_of(a, "student_")
    op = "topk_forward_kl" if a.loss == "topk_forward_kl" else "opd_loss"
    wanted, is_sum = wanted_of(inputs), a.reduction == "sum"
    with torch.no_grad():
        sides, fields = Sides(a), Fields(a.student_hidden.shape[:-1])
        scale = torch.ones(()) if a.scale is None else a.scale
        scale = scale.to(a.student_hidden.device, torch.float64).expand(fields.shape)
        gradients = Gradients(inputs, [want and is_sum for want in wanted], unit_of(scale))
        kept = []
        for chunk in scored_chunks(a, sides):
            fields.put_scored(chunk)
            if any(wanted) and is_sum:
                factor = take(scale, chunk.places) / gradients.unit
                if chunk.counted is not None:
                    factor = torch.where(chunk.counted, factor, 0.0)
                add_chunk(gradients, op, a, sides, chunk.places, chunk.kept, chunk.hidden, chunk.logits, factor)
            elif any(wanted):
                kept.append(chunk.rows(chunk.kept))
        found = fields.along(a)
        if is_sum:
            terms = torch.where(fields["counted"], weighted(scale, fields["loss"]), 0.0)
            found["loss"] = terms.sum().to(fields["loss"].dtype)
    if any(wanted) and is_sum:
        found["loss"] = with_formed(a, gradients, found["loss"])
    elif any(wanted):
        (found["loss"],) = with_recomputed(op, a, "student_", kept, found["loss"])
    return found

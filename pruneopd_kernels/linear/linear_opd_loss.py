"""`linear_opd_loss`: a loss of on-policy distillation weighted by reliability, from hidden states and heads."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import checks
from ._checks import is_from_server
from ._declaration import from_hidden_states
from ._forward import problem_of
from ._passes import FormedInBackward, FormedInForward, forward_pass
from ._products import autocast_dtype, without_autocast

Loss = Literal["topk_policy", "reverse_kl", "topk_forward_kl"]
Reduction = Literal["none", "sum"]


class LinearOpdLoss(NamedTuple):
    """Of `linear_opd_loss`: a loss, and then the fields of `Reliability`."""

    loss: Tensor
    """float32 per position, or 0-d for `reduction="sum"`: weighted by L; differentiable."""
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
def linear_opd_loss(  # noqa: D417 the other arguments are described once, for all functions
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_topk_ids: Tensor | None = None,
    teacher_topk_logprobs: Tensor | None = None,
    chunk_size: int | None = None,
    loss: Loss = "topk_policy",
    reduction: Reduction = "none",
    scale: Tensor | None = None,
    skip_exhausted: bool = False,
    **arguments: Any,
) -> LinearOpdLoss:
    """Compute a loss weighted by reliability, with at most `chunk_size` positions of logits alive.

    With L and the rewards of `linear_reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12, 14-16), at each position

        topk_policy:      topk_policy_loss with the rewards (L * r) as advantages, on-policy
        reverse_kl:       L * KL(student || teacher)
        topk_forward_kl:  L * sum(q * (log q - log p)), over the teacher's k candidates

    Positions are taken chunk by chunk in time order, so a chunk's weights are known when its gradient is formed. The
    gradients of hidden states and head are formed chunk by chunk, too; the head's is summed in float32. Logits and
    their gradient exist for one chunk at a time. With `reduction="sum"` the forward pass forms the gradients: four
    products per position (student, teacher, hidden states, head). With `"none"` the backward pass computes the
    student's logits again, for `reverse_kl` also the teacher's. Autocast, masks and the order of positions are as in
    `linear_reliability`.

    For `loss="topk_forward_kl"`, `teacher_topk_ids` and `teacher_topk_logprobs`, as a server sends them, may take the
    place of the teacher's hidden states and weight. Then the overlap is that of both top-k, and the rewards cover the
    candidates of both (the strategy `"intersection"` of `opd_rewards`), weighted by L.

    Args:
        teacher_topk_ids: int32 or int64 `[..., k]`: a server's candidates, the most probable first where
            `metric="top_p"`. An id below 0 is padding.
        teacher_topk_logprobs: float `[..., k]`: their log-probabilities, in nats.
        loss: `"topk_policy"`, `"reverse_kl"` or `"topk_forward_kl"`.
        reduction: `"none"`: the loss of each position; `"sum"`: `sum(scale * loss)`, whose gradients can be fetched by
            one backward pass.
        scale: float, 0-d or one a position, for `reduction="sum"`, such as 1 over the number of valid positions; where
            it is 0 the loss has no part. It gets no gradient. None: 1.
        skip_exhausted: Once a response's R has reached 0 its later positions are treated as masked, with the count
            carried, whatever the chunks, and make no further products. Needs `w_base=0`. On a GPU each chunk is waited
            for.

    Returns:
        `loss`, float32 per position or 0-d, differentiable once in `student_hidden`, `student_weight` and
        `student_bias`; `entropy` float32 per position, the student's; and the fields of `Reliability`. Nothing else
        is differentiable. Gradients have their tensors' dtypes.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

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
    """Check what only a loss has."""
    losses = get_args(Loss)
    checks.one_of(op, "loss", a.loss, losses)
    if is_from_server(a) and a.loss != losses[-1]:
        checks.bad_value(op, "loss", f"be {losses[-1]!r} when teacher_topk_ids are given", repr(a.loss))
    checks.one_of(op, "reduction", a.reduction, get_args(Reduction))
    if a.scale is not None:
        shape = a.student_hidden.shape[:-1]
        if a.reduction == "none":
            checks.bad_value(op, "scale", "be None when reduction is 'none'", f"shape {list(a.scale.shape)}")
        if a.scale.ndim != 0 and a.scale.shape != shape:
            checks.bad_value(op, "scale", f"have shape [] or {list(shape)}", list(a.scale.shape))
        checks.has_one_for_each(op, "scale", a.scale, a.student_hidden, a.scale.shape)
    if a.skip_exhausted and a.w_base != 0:
        checks.bad_value(op, "w_base", "be 0 when skip_exhausted is True", a.w_base)


def compute(a: Any) -> LinearOpdLoss:
    inputs, teacher = (
        tuple(getattr(a, f"{side}_{name}") for name in ("hidden", "weight", "bias")) for side in ("student", "teacher")
    )
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    autocast = autocast_dtype(a.student_hidden.device)
    with torch.no_grad():
        problem = problem_of(a)
        with without_autocast(a.student_hidden):
            formed = forward_pass(problem, inputs, wanted)
            results = formed.fields["entropy"], *formed.fields.reliability(a)
    loss = formed.loss
    if any(wanted) and a.reduction == "sum":
        loss = FormedInForward.apply(*inputs, formed)  # type: ignore[no-untyped-call]
    elif any(wanted):
        needs_teacher = a.loss == "reverse_kl"
        loss = FormedInBackward.apply(*inputs, formed, problem, teacher if needs_teacher else (), autocast)  # type: ignore[no-untyped-call]
    return LinearOpdLoss(loss, *results)

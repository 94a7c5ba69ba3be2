"""`linear_opd_loss`: a loss of on-policy distillation weighted by reliability, from hidden states and heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import Metric, RewardWeight
from ..ops._operator import Impl
from ._checks import Loss, Reduction, check
from ._forward import problem_of
from ._passes import FormedInBackward, FormedInForward, forward_pass
from ._products import autocast_dtype, without_autocast


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


def linear_opd_loss(
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
    token_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    drift_count: Tensor | None = None,
    k: int = 16,
    threshold: float = 0.7,
    w_drop: float = 0.01,
    w_base: float = 0.5,
    eps: float = 1e-8,
    metric: Metric = "overlap",
    top_p: float = 0.95,
    reward_weight: RewardWeight = "student",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> LinearOpdLoss:
    """A loss weighted by reliability, of logits of which never more than `chunk_size` positions exist.

    With L and the rewards of `linear_reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12, 14-16), at each position

        topk_policy:      topk_policy_loss with the rewards (L * r) as advantages, on-policy
        reverse_kl:       L * KL(student || teacher)
        topk_forward_kl:  L * sum(q * (log q - log p)), over the teacher's k candidates

    Positions are taken chunk by chunk in time order, so that a chunk's weights are known when its gradient is formed.
    The gradients of hidden states and head are formed chunk by chunk too, the head's summed in float32; logits and
    their gradient never exist for more than one chunk. With `reduction="sum"` that happens in the forward pass, where
    the logits are at hand: four products a position (student, teacher, hidden states, head). With `"none"`, whose
    positions get their gradients later, the backward pass computes the student's logits again, for `reverse_kl` the
    teacher's too. Autocast, masks and the order of positions are as in `linear_reliability`.

    In place of the teacher's hidden states and weight, `teacher_topk_ids` and `teacher_topk_logprobs` may be given, as
    a server sends them: for `loss="topk_forward_kl"`, with the overlap of both top-k, and with rewards over the
    candidates of both (the strategy `"intersection"` of `opd_rewards`), weighted by L.

    Args:
        student_hidden: float32, bfloat16 or float16 `[B, T, H]` (padded) or `[N, H]` (packed), with any strides.
        student_weight: The head's weight `[V, H]`, of the same dtype unless under autocast.
        teacher_hidden: `[B, T, H']` or `[N, H']`; H' and dtype may differ from the student's.
        teacher_weight: `[V', H']`.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. None: all positions are
            valid. On a GPU the valid positions are counted, which waits for it once.
        student_bias: `[V]`.
        teacher_bias: `[V']`.
        teacher_topk_ids: int32 or int64 `[..., k]`: a server's candidates, the most probable first where
            `metric="top_p"`. An id below 0 is padding.
        teacher_topk_logprobs: float `[..., k]`: their log-probabilities, in nats.
        chunk_size: How many positions' logits exist at a time, >= 1. None: as many as fit into 256 MiB a model.
        loss: `"topk_policy"`, `"reverse_kl"` or `"topk_forward_kl"`.
        reduction: `"none"`: the loss of each position; `"sum"`: `sum(scale * loss)`, whose gradients can be fetched by
            one backward pass.
        scale: float, 0-d or one a position, for `reduction="sum"`, such as 1 over the number of valid positions; where
            it is 0 the loss has no part. It gets no gradient. None: 1.
        skip_exhausted: Once a response's R has reached 0 its later positions are treated as masked, with the count
            carried, whatever the chunks, and make no further products. Needs `w_base=0`. On a GPU each chunk is waited
            for.
        token_ids: As in `reliability`, and so are all that follow.
        cu_seqlens: int32 `[B + 1]`, required exactly when positions are packed.
        drift_count: int32 `[B]`: what C starts from. None: 0.
        k: Candidates per position.
        threshold: A position drifts where its overlap is below this.
        w_drop: Reliability lost with each drift.
        w_base: What is added to the reliability to give the weight.
        eps: A position counts towards E where its R exceeds this.
        metric: `"overlap"` or `"top_p"` decides about drift.
        top_p: Mass of the teacher's nucleus.
        reward_weight: Rewards are weighted by the `"student"`'s or the `"teacher"`'s probabilities, or `"none"`.
        student_temperature: What the student's logits are divided by.
        teacher_temperature: The same for the teacher; a server's log-probabilities are taken as they are.
        vocab_size: Only ids below it exist; required where V and V' differ.
        impl: Implementation to use; an explicit one runs or raises.

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
    arguments = dict(locals())
    # Python loops are no part of a graph. To say so when this file is read would import torch's compiler.
    run = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return run(arguments)


def _run(arguments: dict[str, Any]) -> LinearOpdLoss:
    check("linear_opd_loss", arguments)
    inputs = (arguments["student_hidden"], arguments["student_weight"], arguments["student_bias"])
    teacher = (arguments["teacher_hidden"], arguments["teacher_weight"], arguments["teacher_bias"])
    reduction, autocast = arguments["reduction"], autocast_dtype(inputs[0].device)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    with torch.no_grad():
        problem = problem_of(arguments)
        with without_autocast(inputs[0]):
            formed = forward_pass(problem, inputs, (wanted[0], wanted[1], wanted[2]), reduction, arguments["scale"])
            fields = formed.fields
            results = fields.entropy, *fields.reliability()
    loss = formed.loss
    if any(wanted) and reduction == "sum":
        loss = FormedInForward.apply(*inputs, formed)  # type: ignore[no-untyped-call]
    elif any(wanted):
        needs_teacher = arguments["loss"] == "reverse_kl"
        loss = FormedInBackward.apply(  # type: ignore[no-untyped-call]
            *inputs, formed, problem, teacher if needs_teacher else None, autocast
        )
    return LinearOpdLoss(loss, *results)

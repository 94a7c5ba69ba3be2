"""`topk_policy_loss`: the clipped policy-gradient loss over candidates, fused with its gradient."""

from __future__ import annotations

from typing import Any

from .. import checks
from ._operator import Impl, Tensor, operator
from .row_stats import through_logprobs


@operator
def topk_policy_loss(
    student_logits: Tensor,
    topk_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_dual: float = 3.0,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Policy-gradient loss over several candidates a position, clipped as in PPO, for rewards as advantages.

    With A the advantage of candidate j, such as its weighted reward L * r (Prune-OPD, arXiv:2605.07804, eq. 11), and
    log p[j] the log-softmax of the student's logits over their temperature at its id

        ratio = exp(clamp(log p[j] - old[j], -20, 20))
        l[j] = max(-A * ratio, -A * clamp(ratio, 1 - clip_low, 1 + clip_high))
        l[j] = min(l[j], -A * clip_dual)    where A < 0
        loss = sum(l[j])

    where `old` is `old_logprobs`, or log p itself, held constant: then every ratio is 1, and the gradient is that of
    -sum(A * log p). The forward pass reads each logit once and saves the derivative by each log p[j] and three floats
    per position; the backward pass reads each logit once and writes its gradient once.

    A candidate with A = 0, an id below 0 or log p = -inf has no part in the loss. Where nothing has, or a position is
    masked, its logits are not read, its loss and its gradient are 0. A row with a NaN, a +inf or no finite logit has a
    loss of NaN. Where a loss is not finite, the gradient is NaN for every id. On ties between the clipped and the
    unclipped, the gradient is the unclipped one's.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides.
        topk_ids: int32 or int64 `[..., m]`, m from 1 to 512: the candidates; duplicates are allowed, an id below 0 is
            padding.
        advantages: float `[..., m]`.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        old_logprobs: float `[..., m]`: log p under the policy that sampled, in nats. None: on-policy.
        clip_low: How far below 1 a ratio counts, in [0, 1].
        clip_high: How far above 1 a ratio counts, >= 0.
        clip_dual: The greatest ratio that counts where A < 0, > 1; inf: none.
        student_temperature: What the student's logits are divided by, > 0.
        vocab_size: Only ids below it exist, for the softmax; ids from it on get a gradient of 0. None: V.

    Returns:
        float32 `[...]`: the losses, differentiable in `student_logits` alone, once. The gradient has its dtype.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import topk_policy_loss
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
        >>> loss = topk_policy_loss(logits, torch.tensor([[1, 2]]), torch.tensor([[1.0, -0.5]]))
        >>> loss.detach()
        tensor([-0.5000])
        >>> loss.sum().backward()
        >>> logits.grad
        tensor([[ 0.0450, -0.6674,  0.6224]])
    """
    ...


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    logits = a.student_logits
    checks.logits(op, "student_logits", logits, float64)
    checks.candidates(op, "topk_ids", a.topk_ids, logits, checks.MAX_POLICY_CANDIDATES, "m")
    checks.has_one_for_each(op, "advantages", a.advantages, logits, a.topk_ids.shape)
    checks.mask_of_positions(op, a.mask, logits, logits.shape[:-1])
    checks.has_one_for_each(op, "old_logprobs", a.old_logprobs, logits, a.topk_ids.shape)
    vocab_size = checks.vocab_size(op, a)
    checks.scalars(op, a)
    if values:
        checks.candidate_values(op, "topk_ids", a.topk_ids, a.mask, vocab_size)


SAVED = ("coefficients", "state")  # the derivatives by each log p, NaN where the loss is not finite; the row's softmax


def kept(a: Any) -> tuple[str, ...]:
    return "student_logits", "topk_ids", *SAVED


def fake(a: Any, empty: Any) -> Any:
    return empty("logits"), empty("float64", a.topk_ids.shape[-1]), empty("float64", 3)


def compute(a: Any, run: Any) -> tuple[Tensor, ...]:
    from .. import formulas

    used = formulas.policy_positions(a.topk_ids, a.advantages, a.mask)
    scalars = {"entropy": False, "temperature": a.student_temperature, "vocab_size": a.vocab_size}
    row = run("row_stats", a.student_logits, a.topk_ids, used, **scalars)
    terms_of = formulas.on_policy_terms if a.old_logprobs is None else formulas.policy_terms
    terms, derivatives = terms_of(row.logprobs, a)
    loss = formulas.where_used(used, terms.sum(-1)).to(row.lse.dtype)
    return loss, formulas.coefficients_of(loss, derivatives, used), row.state


def backward(a: Any, gradient: Tensor) -> Tensor:
    return through_logprobs(gradient, a, a.topk_ids, a.coefficients)

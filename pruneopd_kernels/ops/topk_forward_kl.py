"""`topk_forward_kl`: what a trainer computes when a teacher's server sends its top-k, fused with its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import checks
from ..checks import Tail
from ._operator import Impl, Tensor, operator
from .row_stats import through_logprobs


@operator
def topk_forward_kl(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    tail: Tail = "bucket",
    logprob_min: float | None = None,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> TopkForwardKl:
    """KL(teacher || student) over the teacher's candidates, and how both models' candidates agree.

    With T the teacher's candidates, log q their log-probabilities as given, S the k most probable ids of the student
    and p its softmax

        loss = sum(q[j] * (log q[j] - log p[j]) for j in T) + rest
        rest = q_r * (log q_r - log p_r)                        tail="bucket"
        rest = sum(p[j] - q[j] for j in T)                      tail="generalised"
        rest = 0                                                tail="none"
        O = |S & T| / max(|S|, |T|)                             (6)

    where q_r = 1 - sum(q) and p_r = 1 - sum(p), both at least 2**-24, are what lies outside of T: one more candidate.
    The first two are divergences: never below 0, and 0 with a gradient of 0 where p = q on T. Without a tail, as verl
    computes it, the loss can be negative and its gradient at p = q is not 0. Nothing is renormalised. If `logprob_min`
    is given, log q and log p are first raised to it; a log p below it has no gradient. The forward pass reads each
    logit once and saves k + 3 floats per position; the backward pass reads each logit once and writes its gradient
    once. A log-softmax is never written.

    A slot with an id below 0, or whose log-probability is -inf, is empty: it matches nothing and has no mass. If
    another log-probability is NaN, so are the loss and the teacher's mass. Where log p = -inf < log q the loss is +inf.
    A row with a NaN, a +inf or no finite logit has overlap 0, and its loss, student's mass and advantage are NaN. Where
    a loss is not finite, the gradient is NaN for every id. At a masked position the logits are never read: floats are
    0, candidates are 0 .. k-1, the gradient is 0.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides.
        teacher_topk_ids: int32 or int64 `[..., k]`, k from 1 to min(vocab_size, 256), in any order; no id twice among
            the filled slots (on a GPU, where values are not checked, the first counts).
        teacher_topk_logprobs: float `[..., k]`, natural logarithms.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        tail: What is added for the ids outside of T: `"bucket"`, `"generalised"` or `"none"`.
        logprob_min: What log-probabilities are raised to, finite. None: they stay as they are.
        student_temperature: What the student's logits are divided by, > 0. The teacher's log-probabilities come with
            whatever temperature they were made with.
        vocab_size: Only ids below it exist, for the candidates and for the softmax. None: V.

    Returns:
        The fields of `TopkForwardKl`. `loss` is differentiable in `student_logits` alone, once; the gradient has the
        logits' dtype. `student_topk_ids` are in descending order of logit, of equal ones the lower id first.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import topk_forward_kl
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
        >>> out = topk_forward_kl(logits, torch.tensor([[1, 0]]), torch.tensor([[0.6, 0.3]]).log())
        >>> out.loss.detach(), out.overlap, out.student_topk_ids
        (tensor([0.2097]), tensor([0.5000]), tensor([[1, 2]]))
        >>> out.loss.sum().backward()
        >>> logits.grad
        tensor([[-0.2100,  0.0652,  0.1447]])
    """
    ...


class TopkForwardKl(NamedTuple):
    """Of `topk_forward_kl`. Per position means the leading axes of the logits."""

    loss: Tensor
    """float32 per position: the sum of q (log q - log p) over the teacher's candidates; differentiable."""
    student_mass: Tensor
    """float32 per position: the student's probability of all the teacher's candidates together."""
    teacher_mass: Tensor
    """float32 per position: the teacher's."""
    overlap: Tensor
    """float32 per position: the share of the student's own k candidates that are among the teacher's (eq. 6)."""
    overlap_token_advantage: Tensor
    """float32 per position: the mean of -q (log q - log p) over the candidates of both; 0 where there is none."""
    student_topk_ids: Tensor
    """int64 `[..., k]`: the student's candidates in order."""


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    logits, ids = a.student_logits, a.teacher_topk_ids
    checks.logits(op, "student_logits", logits, float64)
    checks.candidates(op, "teacher_topk_ids", ids, logits, checks.MAX_K, "k")
    checks.has_one_for_each(op, "teacher_topk_logprobs", a.teacher_topk_logprobs, logits, ids.shape)
    checks.mask_of_positions(op, a.mask, logits, logits.shape[:-1])
    vocab_size = checks.vocab_size(op, a)
    checks.scalars(op, a)
    if ids.shape[-1] > vocab_size:
        checks.bad_value(op, "teacher_topk_ids", f"have at most vocab_size = {vocab_size} candidates", ids.shape[-1])
    if values:
        checks.candidate_values(op, "teacher_topk_ids", ids, a.mask, vocab_size)
        checks.distinct(op, "teacher_topk_ids", ids, a.teacher_topk_logprobs, a.mask)


SAVED = ("coefficients", "state")  # the derivatives by each log p, NaN where the loss is not finite; the row's softmax


def kept(a: Any) -> tuple[str, ...]:
    return "student_logits", "teacher_topk_ids", *SAVED


def fake(a: Any, empty: Any) -> Any:
    k, floats = a.teacher_topk_ids.shape[-1], [empty("logits") for _ in range(4)]
    return *floats[:3], empty("float32"), floats[3], empty("int64", k), empty("float64", k), empty("float64", 3)


def compute(a: Any, run: Any) -> tuple[Tensor, ...]:
    from .. import formulas

    k = a.teacher_topk_ids.shape[-1]
    scalars = {"k": k, "entropy": False, "temperature": a.student_temperature, "vocab_size": a.vocab_size}
    row = run("row_stats", a.student_logits, a.teacher_topk_ids, a.mask, **scalars)
    outputs, coefficients = formulas.topk_forward_kl(row, a)
    return *outputs, row.topk_ids, coefficients, row.state


def backward(a: Any, gradient: Tensor) -> Tensor:
    return through_logprobs(gradient, a, a.teacher_topk_ids, a.coefficients)

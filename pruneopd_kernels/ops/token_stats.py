"""`token_stats`: what two models say about each position, from one read of both sides' logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import checks
from ..config import PruneConfig
from ._operator import Impl, Tensor, operator


@operator
def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    k: int = PruneConfig.k,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """Candidates, log-probabilities, entropies and exact divergences of both models at each position.

    With x and y the student's and the teacher's logits over their temperatures, p and q the softmax of each, S and T
    the k most probable ids (Prune-OPD, arXiv:2605.07804)

        O = |S & T| / max(|S|, |T|)                         (6)
        lse = log(sum(exp(x)))
        entropy = -sum(p * log p)
        reverse_kl = KL(p || q) = sum(p * (log p - log q))
        forward_kl = KL(q || p)

    and log p and log q of the candidates of both and of the response's token. The sums run over the whole vocabulary;
    each logit is read once, and no vocabulary-sized tensor is written.

    A row with a NaN, a +inf or no finite logit has NaN for all but its candidates, its overlap (0) and its lse (what
    `torch.logsumexp` gives), and so has every divergence with it. A logit of -inf means that the token does not exist:
    it is never a candidate, and where log q = -inf < log p, KL(p || q) is +inf. Where a row has fewer than k other ids
    the last slots are empty: they hold the next ids with log-probability -inf, match nothing, and |S| and |T| count
    the filled slots. At a masked position the logits are never read: floats are 0, candidates are 0 .. k-1. Arguments
    that `reliability` has, too, mean the same.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides:
            `logits[:, :-1]` is taken without a copy.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        token_ids: int32 or int64 `[...]`, the response's tokens. A negative one (-100) means that there is none.

    Returns:
        The fields of `TokenStats`. None is differentiable. Candidates are in descending order of logit; of equal
        logits the lower id comes first, -0 equals +0, and a NaN comes before everything.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import token_stats
        >>> student = torch.tensor([[0.0, 2.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 2.0, 0.0]])
        >>> out = token_stats(student, teacher, k=2, token_ids=torch.tensor([1]))
        >>> out.student_topk_ids, out.teacher_topk_ids, out.overlap
        (tensor([[1, 2]]), tensor([[1, 0]]), tensor([0.5000]))
        >>> out.student_token_logprob, out.reverse_kl
        (tensor([-0.4076]), tensor([0.1547]))
    """
    ...


class TokenStats(NamedTuple):
    """Of `token_stats`. Per position means the leading axes of the logits; lse, entropy and KL are in nats."""

    student_topk_ids: Tensor
    """int64 `[..., k]`: the student's candidates in order."""
    student_topk_logprobs: Tensor
    """float32 `[..., k]`: the student's log-probabilities of them."""
    teacher_topk_ids: Tensor
    """int64 `[..., k]`: the teacher's candidates in order."""
    teacher_topk_logprobs: Tensor
    """float32 `[..., k]`: the teacher's log-probabilities of them."""
    teacher_on_student_logprobs: Tensor
    """float32 `[..., k]`: the teacher's log-probabilities of the student's candidates."""
    student_on_teacher_logprobs: Tensor
    """float32 `[..., k]`: the student's log-probabilities of the teacher's candidates."""
    overlap: Tensor
    """float32 per position: O, the common share of both top-k (eq. 6)."""
    student_lse: Tensor
    """float32 per position: log-sum-exp of the student's logits over its temperature."""
    teacher_lse: Tensor
    """float32 per position: log-sum-exp of the teacher's logits over its temperature."""
    student_entropy: Tensor
    """float32 per position: entropy of the student's distribution."""
    teacher_entropy: Tensor
    """float32 per position: entropy of the teacher's distribution."""
    reverse_kl: Tensor
    """float32 per position: KL(student || teacher)."""
    forward_kl: Tensor
    """float32 per position: KL(teacher || student)."""
    student_token_logprob: Tensor
    """float32 per position: the student's log-probability of the token; NaN where there is none."""
    teacher_token_logprob: Tensor
    """float32 per position: the teacher's log-probability of the token; NaN where there is none."""


def check(op: str, a: Any, *, float64: bool, values: bool) -> None:
    # A negative token id means that there is none, so there are no values to look at.
    logits = a.student_logits
    checks.logits(op, "student_logits", logits, float64)
    checks.logits(op, "teacher_logits", a.teacher_logits, float64, like=logits)
    checks.mask_of_positions(op, a.mask, logits, logits.shape[:-1])
    checks.ids_of_positions(op, a.token_ids, logits, logits.shape[:-1])
    checks.number_of_candidates(op, a.k, checks.vocab_size(op, a))
    checks.scalars(op, a)


def fake(a: Any, empty: Any) -> Any:
    side = empty("int64", a.k), empty("logits", a.k)
    crossed = empty("logits", a.k), empty("logits", a.k)
    return *side, empty("int64", a.k), empty("logits", a.k), *crossed, *(empty("logits") for _ in range(9))

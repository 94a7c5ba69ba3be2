"""`token_stats`: what two models say about each position, from one read of both sides' logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference._rows import float_type
from ..results import TokenStats
from ._implementations import Impl
from ._registration import Outputs, call, register


def token_stats(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    k: int = 16,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """Candidates, log-probabilities, entropies and exact divergences of both models at each position.

    With x and y the student's and the teacher's logits over their temperatures, p and q the softmax of each, S and T
    the k most probable ids (Prune-OPD, arXiv:2605.07804)

        O = |S & T| / k                                     (6)
        lse = log(sum(exp(x)))
        entropy = -sum(p * log p)
        reverse_kl = KL(p || q) = sum(p * (log p - log q))
        forward_kl = KL(q || p)

    and log p and log q of the candidates of both and of the response's token. The sums run over the whole vocabulary;
    every logit is read once, and nothing of the vocabulary's size is written.

    A row with a NaN, a +inf or no finite logit has NaN for all but its candidates, its overlap (0) and its lse (what
    `torch.logsumexp` gives), and so has every divergence with it. A logit of -inf is an ordinary one: where
    log q = -inf < log p, KL(p || q) is +inf. At a masked position the logits are never read: floats are 0, candidates
    are 0 .. k-1.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V]`; stride 1 on the last axis, any other strides:
            `logits[:, :-1]` is taken without a copy.
        teacher_logits: the same but for V and the dtype, which may differ.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        token_ids: int32 or int64 `[...]`, the response's tokens. A negative one (-100) means that there is none.
        k: Candidates per position, 1 to min(vocab_size, 256).
        student_temperature: What the student's logits are divided by, > 0. The order of candidates does not change.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist, for the candidates and for the softmax; required where the last axes
            differ, as the padded heads of two models with one tokenizer often do. None: V.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        The fields of `TokenStats`: ids int64 and log-probabilities float32 `[..., k]`, the others float32 per position;
        `student_token_logprob` and `teacher_token_logprob` are NaN where there is no token. None is differentiable.
        Candidates are in descending order of logit; of equal logits the lower id comes first, -0 equals +0, and a NaN
        comes before everything.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

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
    outputs = call(
        "token_stats",
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        mask=mask,
        token_ids=token_ids,
        k=k,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        impl=impl,
    )
    return TokenStats(*outputs)


def _fake(*, student_logits: Tensor, teacher_logits: Tensor, k: int, **_: Any) -> Outputs:
    per_position = student_logits.shape[:-1]
    dtype = float_type(student_logits, teacher_logits)

    def new(*more: int, dtype: torch.dtype = dtype) -> Tensor:
        return student_logits.new_empty((*per_position, *more), dtype=dtype)

    outputs = TokenStats(
        student_topk_ids=new(k, dtype=torch.int64),
        student_topk_logprobs=new(k),
        teacher_topk_ids=new(k, dtype=torch.int64),
        teacher_topk_logprobs=new(k),
        teacher_on_student_logprobs=new(k),
        student_on_teacher_logprobs=new(k),
        overlap=new(),
        student_lse=new(),
        teacher_lse=new(),
        student_entropy=new(),
        teacher_entropy=new(),
        reverse_kl=new(),
        forward_kl=new(),
        student_token_logprob=new(),
        teacher_token_logprob=new(),
    )
    return tuple(outputs)


register("token_stats", _fake)

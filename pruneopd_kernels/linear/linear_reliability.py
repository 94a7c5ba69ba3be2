"""`linear_reliability`: what `reliability` returns, from both models' hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import Metric, RewardWeight
from ..ops import Reliability
from ..ops._operator import Impl
from ._checks import check
from ._forward import Fields, computed_chunks, positions_of, problem_of
from ._products import without_autocast


def linear_reliability(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_size: int | None = None,
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
) -> Reliability:
    """`reliability` of `logits = hidden @ weight.T + bias`, of which never more than `chunk_size` positions exist.

    The valid positions are taken response by response, the count of drifts is carried from chunk to chunk, and the
    answer is that of `reliability` (Prune-OPD, arXiv:2605.07804, eq. 6-12, 14-16) on the same logits, bit for bit. The
    matrix products are torch's; of a masked position none is made. Under autocast hidden states, weights and biases are
    rounded to its dtype and the logits are float32; else all of one model have one dtype, and so have its logits.

    Args:
        student_hidden: float32, bfloat16 or float16 `[B, T, H]` (padded) or `[N, H]` (packed), with any strides: what
            the student's head is applied to.
        student_weight: The head's weight `[V, H]`, of the same dtype unless under autocast.
        teacher_hidden: `[B, T, H']` or `[N, H']`; H' and dtype may differ from the student's.
        teacher_weight: `[V', H']`.
        mask: bool, integer or float `[B, T]` or `[N]`; non-zero where a position is valid. None: all positions are
            valid. On a GPU the valid positions are counted, which waits for it once.
        student_bias: `[V]`.
        teacher_bias: `[V']`.
        chunk_size: How many positions' logits exist at a time, >= 1. None: as many as fit into 256 MiB a model.
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
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist; required where V and V' differ.
        impl: Implementation to use; an explicit one runs or raises.

    Returns:
        The fields of `Reliability`. None is differentiable.

    Raises:
        ValueError: A shape or a value is not allowed.
        TypeError: A dtype is not allowed.
        RuntimeError: The implementation is not usable here.

    Examples:
        >>> import torch
        >>> from pruneopd_kernels import linear_reliability, reliability
        >>> student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> head = torch.randn(100, 8)
        >>> out = linear_reliability(student, head, teacher, head, k=4)
        >>> torch.equal(out.drift_count, reliability(student @ head.T, teacher @ head.T, k=4).drift_count)
        True
    """
    arguments = dict(locals())
    # Python loops are no part of a graph. To say so when this file is read would import torch's compiler.
    run = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run
    return run(arguments)


@torch.no_grad()
def _run(arguments: dict[str, Any]) -> Reliability:
    check("linear_reliability", arguments)
    problem = problem_of(arguments)
    with without_autocast(problem.student.hidden):
        positions = positions_of(problem)
        fields = Fields(problem, positions)
        for computed in computed_chunks(problem, positions):
            fields.put(computed)
        return fields.reliability()

"""`parallel.topk_policy_loss`: the clipped policy-gradient loss, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formulas import float_type, policy_positions, policy_terms
from ..ops._operator import Impl
from ._agreement import agree
from ._exchange import outside_graphs
from ._loss import student_rows, through_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@outside_graphs
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
    group: ProcessGroup | None = None,
) -> Tensor:
    """`pruneopd_kernels.topk_policy_loss` over a vocabulary that is split over the ranks of a group.

    Every rank calls it, with its slice of the logits and with all else equal, and gets the same loss. Two exchanges:
    32 bytes a rank to agree, then 4 bytes times `m + 3` for each position and rank. None in the backward pass.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V_r]`: this rank's slice, of any width, 0 too. Slices are
            contiguous and in the order of the ranks. Stride 1 on the last axis, any other strides.
        topk_ids: int32 or int64 `[..., m]`, m from 1 to 512: candidates, ids of the whole vocabulary; an id below 0 is
            padding.
        advantages: float `[..., m]`.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        old_logprobs: float `[..., m]`: log p under the policy that sampled, in nats. None: on-policy.
        clip_low: How far below 1 a ratio counts, in [0, 1].
        clip_high: How far above 1 a ratio counts, >= 0.
        clip_dual: The greatest ratio that counts where A < 0, > 1; inf: none.
        student_temperature: What the student's logits are divided by, > 0.
        vocab_size: Only ids below it exist, of the whole vocabulary. None: the widths of all slices together.
        impl: Implementation to use for the slice; an explicit one runs or raises.
        group: Group of `torch.distributed` whose ranks hold the slices. None: all ranks.

    Returns:
        float32 `[...]`: the loss of each position, the same on every rank, differentiable in this rank's
        `student_logits` alone, once. Each rank backpropagates the same loss and gets its slice of the gradient of that
        one loss: nothing is summed over ranks.

    Raises:
        ValueError: On every rank: a shape or a value is not allowed on some rank, or differs between ranks.
        TypeError: The same of a dtype.
        RuntimeError: The implementation is not usable on some rank.
    """
    slices = agree(
        "topk_policy_loss",
        group,
        {
            "student_logits": student_logits,
            "topk_ids": topk_ids,
            "advantages": advantages,
            "mask": mask,
            "old_logprobs": old_logprobs,
            "clip_low": clip_low,
            "clip_high": clip_high,
            "clip_dual": clip_dual,
            "student_temperature": student_temperature,
            "vocab_size": vocab_size,
            "impl": impl,
        },
    )
    with torch.no_grad():
        used = policy_positions(topk_ids, advantages, mask)
        rows = student_rows(slices, student_logits, topk_ids, used, 1, student_temperature, impl)
        terms, derivatives = policy_terms(
            rows.logprobs, topk_ids, advantages, old_logprobs, clip_low, clip_high, clip_dual
        )
        loss = torch.where(used, terms.sum(-1), 0.0).to(float_type(student_logits))
    return through_logprobs(
        "topk_policy_loss", slices, student_logits, loss, topk_ids, derivatives, rows.softmax, used, impl
    )

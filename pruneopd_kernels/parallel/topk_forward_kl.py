"""`parallel.topk_forward_kl`: KL(teacher || student) over candidates, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formulas import float_type, forward_terms, measures_of, valid_positions
from ..ops import TopkForwardKl
from ..ops._operator import Impl
from ._agreement import agree
from ._exchange import outside_graphs
from ._loss import student_rows, through_logprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@outside_graphs
def topk_forward_kl(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    logprob_min: float | None = None,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
) -> TopkForwardKl:
    """`pruneopd_kernels.topk_forward_kl` over a vocabulary that is split over the ranks of a group (eq. 6).

    Every rank calls it, with its slice of the logits and with all else equal, and gets the whole answer. Two exchanges:
    32 bytes a rank to agree, then 4 bytes times `3 * k + 1` for each position and rank. None in the backward pass.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V_r]`: this rank's slice, of any width, 0 too. Slices are
            contiguous and in the order of the ranks. Stride 1 on the last axis, any other strides.
        teacher_topk_ids: int32 or int64 `[..., k]`, k from 1 to min(vocab_size, 256): ids of the whole vocabulary, in
            any order; an id below 0 is padding.
        teacher_topk_logprobs: float `[..., k]`, natural logarithms.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        logprob_min: What log-probabilities are raised to, finite. None: they stay as they are.
        student_temperature: What the student's logits are divided by, > 0.
        vocab_size: Only ids below it exist, of the whole vocabulary. None: the widths of all slices together.
        impl: Implementation to use for the slice; an explicit one runs or raises.
        group: Group of `torch.distributed` whose ranks hold the slices. None: all ranks.

    Returns:
        `TopkForwardKl` of the whole vocabulary, on every rank; candidates and overlap are those that one rank would
        get, bit for bit. `loss` is differentiable in this rank's `student_logits` alone, once. Each rank
        backpropagates the same loss and gets its slice of the gradient of that one loss: nothing is summed over ranks.

    Raises:
        ValueError: On every rank: a shape or a value is not allowed on some rank, or differs between ranks.
        TypeError: The same of a dtype.
        RuntimeError: The implementation is not usable on some rank.
    """
    slices = agree(
        "topk_forward_kl",
        group,
        {
            "student_logits": student_logits,
            "teacher_topk_ids": teacher_topk_ids,
            "teacher_topk_logprobs": teacher_topk_logprobs,
            "mask": mask,
            "logprob_min": logprob_min,
            "student_temperature": student_temperature,
            "vocab_size": vocab_size,
            "impl": impl,
        },
    )
    dtype, ids = float_type(student_logits), teacher_topk_ids
    with torch.no_grad():
        valid = valid_positions(mask, student_logits, student_logits.shape[:-1])
        rows = student_rows(slices, student_logits, ids, valid, ids.shape[-1], student_temperature, impl)
        broken = rows.softmax.broken
        terms = forward_terms(rows.logprobs, broken, ids, teacher_topk_logprobs, logprob_min)
        measures = measures_of(rows.topk_ids, broken, terms, ids, valid)
        loss = torch.where(valid, terms.terms.sum(-1), 0.0).to(dtype)
    return TopkForwardKl(
        loss=through_logprobs(
            "topk_forward_kl", slices, student_logits, loss, ids, terms.derivatives, rows.softmax, valid, impl
        ),
        student_mass=measures.student_mass.to(dtype),
        teacher_mass=measures.teacher_mass.to(dtype),
        overlap=measures.overlap.to(torch.float32),
        overlap_token_advantage=measures.overlap_token_advantage.to(dtype),
        student_topk_ids=rows.topk_ids,
    )

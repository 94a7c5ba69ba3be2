"""`parallel.token_stats`: what two models say about each position, each rank holding a slice of the vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formulas import float_type, overlap_count, overlap_of, valid_positions
from ..ops import TokenStats
from ..ops._operator import Impl
from ._agreement import Slices, agree
from ._exchange import gather, outside_graphs
from ._rows import Softmax, candidates_where, entropy, first_candidates, from_owners, kl_divergence, softmax_of
from ._slice import KL_UNIT, logits_of_ids, pair_of, sent_divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@outside_graphs
@torch.no_grad()
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
    group: ProcessGroup | None = None,
) -> TokenStats:
    """`pruneopd_kernels.token_stats` over a vocabulary that is split over the ranks of a group (eq. 6).

    Every rank calls it, with its slice of the logits and with all else equal, and gets the whole answer. Two exchanges:
    32 bytes a rank to agree, then 4 bytes times `6 * k + 6` (`+ 8` with token_ids) for each position and rank.

    Args:
        student_logits: float32, bfloat16 or float16 `[..., V_r]`: this rank's slice, of any width, 0 too. Slices are
            contiguous and in the order of the ranks. Stride 1 on the last axis, any other strides.
        teacher_logits: the same ids of the teacher; the dtype may differ, and so may the width beyond vocab_size.
        mask: bool, integer or float `[...]`; non-zero where a position is valid. None: all positions are valid.
        token_ids: int32 or int64 `[...]`, ids of the whole vocabulary. A negative one means that there is none.
        k: Candidates per position, 1 to min(vocab_size, 256), however narrow the slices are.
        student_temperature: What the student's logits are divided by, > 0.
        teacher_temperature: The same for the teacher.
        vocab_size: Only ids below it exist, of the whole vocabulary. None: the widths of all slices together.
        impl: Implementation to use for the slice; an explicit one runs or raises.
        group: Group of `torch.distributed` whose ranks hold the slices. None: all ranks.

    Returns:
        `TokenStats` of the whole vocabulary, on every rank. Candidates and overlap are those that one rank would get,
        bit for bit; floats are as accurate. None is differentiable.

    Raises:
        ValueError: On every rank: a shape or a value is not allowed on some rank, or differs between ranks.
        TypeError: The same of a dtype.
        RuntimeError: The implementation is not usable on some rank.
    """
    slices = agree(
        "token_stats",
        group,
        {
            "student_logits": student_logits,
            "teacher_logits": teacher_logits,
            "mask": mask,
            "token_ids": token_ids,
            "k": k,
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
            "vocab_size": vocab_size,
            "impl": impl,
        },
    )
    valid = valid_positions(mask, student_logits, student_logits.shape[:-1])
    dtype = float_type(student_logits, teacher_logits)
    temperatures = (student_temperature, teacher_temperature)
    pair = pair_of(slices, student_logits, teacher_logits, valid, k, *temperatures, impl)
    tokens = [] if token_ids is None else [token_ids[..., None]]
    of_tokens = [logits_of_ids(slices, x, ids, valid) for x in (student_logits, teacher_logits) for ids in tokens]
    record = _Record(
        *pair.student,
        logits_of_ids(slices, teacher_logits, pair.student.topk_ids, valid),
        *pair.teacher,
        logits_of_ids(slices, student_logits, pair.teacher.topk_ids, valid),
        pair.student_entropy,
        pair.teacher_entropy,
        sent_divergence(slices, pair.reverse_kl, student_logits, teacher_logits, *temperatures),
        sent_divergence(slices, pair.forward_kl, teacher_logits, student_logits, *temperatures[::-1]),
        torch.cat(of_tokens, -1) if of_tokens else pair.reverse_kl.new_empty((*valid.shape, 0)),
    )
    everyone = gather(record, slices, valid.shape, dtype)

    student = softmax_of(everyone.student_topk_logits[..., 0], everyone.student_log_mass, student_temperature)
    teacher = softmax_of(everyone.teacher_topk_logits[..., 0], everyone.teacher_log_mass, teacher_temperature)
    student_topk_logits, student_topk_ids, teacher_on_student_logits = first_candidates(
        slices, k, everyone.student_topk_logits, everyone.student_topk_ids, everyone.teacher_on_student_logits
    )
    teacher_topk_logits, teacher_topk_ids, student_on_teacher_logits = first_candidates(
        slices, k, everyone.teacher_topk_logits, everyone.teacher_topk_ids, everyone.student_on_teacher_logits
    )
    count = overlap_count(student_topk_ids, teacher_topk_ids).masked_fill(student.broken | teacher.broken, 0)
    student_token, teacher_token = _token_logprobs(slices, student, teacher, token_ids, everyone.token_logits)

    def stored(values: Tensor) -> Tensor:
        where = valid if values.ndim == valid.ndim else valid[..., None]
        return torch.where(where, values, 0.0).to(dtype)

    return TokenStats(
        student_topk_ids=candidates_where(valid, student_topk_ids),
        student_topk_logprobs=stored(student.logprobs(student_topk_logits)),
        teacher_topk_ids=candidates_where(valid, teacher_topk_ids),
        teacher_topk_logprobs=stored(teacher.logprobs(teacher_topk_logits)),
        teacher_on_student_logprobs=stored(teacher.logprobs(teacher_on_student_logits)),
        student_on_teacher_logprobs=stored(student.logprobs(student_on_teacher_logits)),
        overlap=stored(overlap_of(count, k)),
        student_lse=stored(student.lse()),
        teacher_lse=stored(teacher.lse()),
        student_entropy=stored(entropy(student, everyone.student_entropy)),
        teacher_entropy=stored(entropy(teacher, everyone.teacher_entropy)),
        reverse_kl=stored(kl_divergence(student, teacher, everyone.reverse_kl * KL_UNIT)),
        forward_kl=stored(kl_divergence(teacher, student, everyone.forward_kl * KL_UNIT)),
        student_token_logprob=stored(student_token),
        teacher_token_logprob=stored(teacher_token),
    )


class _Record(NamedTuple):
    """What a rank tells of its slice, per position."""

    student_topk_ids: Tensor
    student_topk_logits: Tensor
    student_log_mass: Tensor
    teacher_on_student_logits: Tensor
    teacher_topk_ids: Tensor
    teacher_topk_logits: Tensor
    teacher_log_mass: Tensor
    student_on_teacher_logits: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    token_logits: Tensor  # the student's and the teacher's, or none


def _token_logprobs(
    slices: Slices, student: Softmax, teacher: Softmax, token_ids: Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """NaN where there is no token, or none of this id."""
    if token_ids is None:
        nothing = torch.full_like(student.top, torch.nan)
        return nothing, nothing
    exists = (token_ids >= 0) & (token_ids < slices.vocab_size)
    student_logit, teacher_logit = (from_owners(slices, token_ids, x)[..., None] for x in logits.unbind(-1))
    return (
        student.logprobs(student_logit)[..., 0].masked_fill(~exists, torch.nan),
        teacher.logprobs(teacher_logit)[..., 0].masked_fill(~exists, torch.nan),
    )

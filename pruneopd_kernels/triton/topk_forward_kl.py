"""`topk_forward_kl`: one row's mass and candidates, then the terms of the teacher's candidates and what is shared."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .losses import logprobs_of_candidates, state_of, store_coefficients, store_floats
from .position import for_any_axes, run_at_positions
from .selection import id_of
from .summary import float64


@triton.jit
def agree(candidates, teacher_topk_ids, teacher_ids, K: tl.constexpr):
    """Return the student's ids, their ranks, how many the teacher has too, and which of the teacher's are shared."""
    j = tl.arange(0, teacher_ids.shape[0])
    student = tl.load(candidates + j, mask=j < K, other=-(2**63))
    student_ids = id_of(student).to(tl.int64)
    rank = tl.zeros(j.shape, tl.int32)
    common, shared = tl.zeros(j.shape, tl.int1), tl.zeros(j.shape, tl.int1)
    for i in range(K):
        other = tl.load(candidates + i)
        rank += (other > student).to(tl.int32)
        shared |= teacher_ids == id_of(other)
        common |= student_ids == tl.load(teacher_topk_ids + i).to(tl.int64)
    return student_ids, rank, tl.sum((common & (j < K)).to(tl.int32), 0), shared


@triton.jit
def forward_terms(student, teacher, is_padding, logprob_min):
    """Return each candidate's q (log q - log p) and its derivative by log p, 0 for padding."""
    may_move = is_padding == 0
    if logprob_min is not None:
        least = float64(logprob_min)
        may_move &= (student < least) == 0  # NaN too
        student, teacher = tl.where(student < least, least, student), tl.where(teacher < least, least, teacher)
    q = tl.exp(teacher)
    has_mass = (teacher != float("-inf")) & (is_padding == 0)
    is_impossible = (student == float("-inf")) & (teacher == teacher)
    terms = tl.where(is_impossible, float("inf"), q * (teacher - student))
    return tl.where(has_mass, terms, 0.0), tl.where(may_move & has_mass, -q, 0.0)


@triton.jit
def forward_kl_position(n, sides, vocab_size, divergences, broken, candidates, inputs, outputs, scalars,
                        K: tl.constexpr, OPTION: tl.constexpr):  # fmt: skip
    teacher_topk_ids, teacher_topk_logprobs = inputs
    loss, student_mass, teacher_mass, overlap, advantage, topk_ids, coefficients, state = outputs
    j = tl.arange(0, triton.next_power_of_2(K))
    exists = j < K
    at = n * K
    ids = tl.load(teacher_topk_ids + at + j, mask=exists, other=-1).to(tl.int64)
    student_ids, rank, common, shared = agree(candidates[0], teacher_topk_ids + at, ids, K)
    tl.store(topk_ids + at + rank, student_ids, mask=exists)

    is_padding = ids < 0
    student = logprobs_of_candidates(sides[0], ids, vocab_size)
    teacher = tl.load(teacher_topk_logprobs + at + j, mask=exists, other=0.0).to(tl.float64)
    teacher = tl.where(is_padding, float("-inf"), teacher)
    terms, derivatives = forward_terms(student, teacher, is_padding, scalars[0])
    shares = tl.maximum(tl.sum(shared.to(tl.int32), 0), 1).to(tl.float64)
    gain = tl.sum(tl.where(shared, -terms, 0.0), 0) / shares
    mass = tl.sum(tl.exp(student), 0)
    total = tl.sum(terms, 0)
    nan = tl.full([], float("nan"), tl.float64)
    if broken:
        total, mass, gain, common = nan, nan, nan, common * 0
    measures = (total, mass, tl.sum(tl.exp(teacher), 0), common.to(tl.float64) / K, gain)
    store_floats((loss, student_mass, teacher_mass, overlap, advantage), n, measures)
    store_coefficients(coefficients, at + j, derivatives, exists, total)
    store_floats((state, state + 1), 2 * n, state_of(sides[0]))


@for_any_axes
def topk_forward_kl(a: Any) -> tuple[Tensor, ...]:
    *shape, k = a.teacher_topk_ids.shape
    new: Any = a.student_logits.new_empty
    outputs = [new(shape, dtype=torch.float32) for _ in range(5)]
    outputs += [new((*shape, k), dtype=torch.int64), new((*shape, k), dtype=torch.float32)]
    outputs += [new((*shape, 2), dtype=torch.float32)]
    inputs = (a.teacher_topk_ids, a.teacher_topk_logprobs)
    run_at_positions(forward_kl_position, a, inputs, outputs, (a.logprob_min,), mask=a.mask, k=k, selects=True)
    return tuple(outputs)

"""`reliability_from_topk`: overlap and drift from candidates in the caller's order, then the scan."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import flags, float64_bits, mass_of_nucleus, outputs_of, per_position
from .scan import scan
from .selection import count
from .summary import float64


@triton.jit
def filled(ids, logprobs, at, exists):
    """Return candidates, below 0 where a slot is empty by itself."""
    slots = tl.load(ids + at, mask=exists, other=-1).to(tl.int64)
    if logprobs is not None:
        slots = tl.where(tl.load(logprobs + at, mask=exists, other=0.0) == float("-inf"), -1, slots)
    return slots


@triton.jit
def is_accepted(slots, logprobs, token, enough):
    """Return whether each position's token is in the nucleus, which the mass `enough` completes."""
    logprobs = tl.where(slots >= 0, logprobs.to(tl.float64), float("-inf"))
    mass = tl.cumsum(tl.exp(logprobs), 1)
    reached = ((mass >= enough) & (slots >= 0)).to(tl.int32)
    before = tl.cumsum(reached, 1) - reached  # prefixes that were enough before this candidate
    is_token = (slots >= 0) & (before == 0) & (slots == token[:, None])
    has_nan = tl.max((logprobs != logprobs).to(tl.int32), 1)
    return (count(is_token) > 0) & (has_nan == 0)


@triton.jit(do_not_specialize=["positions", "threshold", "enough"])
def drift_kernel(student_ids, student_logprobs, teacher_ids, teacher_logprobs, mask, token_ids, overlap, drift,
                 positions, threshold, enough, K: tl.constexpr, K_PADDED: tl.constexpr,
                 POSITIONS: tl.constexpr):  # fmt: skip
    """Compute overlap and drift, by acceptance if there are token_ids. An id that came before is as an empty slot."""
    n = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = n < positions
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
    j = tl.arange(0, K_PADDED)[None, :]
    at, exists = n[:, None] * K + j, valid[:, None] & (j < K)
    student = filled(student_ids, student_logprobs, at, exists)
    teacher = filled(teacher_ids, teacher_logprobs, at, exists)
    hits = tl.zeros([POSITIONS, K_PADDED], tl.int1)
    student_again, teacher_again = hits, hits
    for i in range(K):
        student_i = filled(student_ids, student_logprobs, n * K + i, valid)[:, None]
        teacher_i = filled(teacher_ids, teacher_logprobs, n * K + i, valid)[:, None]
        hits |= student == teacher_i
        student_again |= (student == student_i) & (j > i)
        teacher_again |= (teacher == teacher_i) & (j > i)
    student, teacher = tl.where(student_again, -1, student), tl.where(teacher_again, -1, teacher)
    common = count(hits & (student >= 0))
    share = common.to(tl.float64) / tl.maximum(tl.maximum(count(student >= 0), count(teacher >= 0)), 1)
    if token_ids is not None:
        logprobs = tl.load(teacher_logprobs + at, mask=teacher >= 0, other=0.0)
        token = tl.load(token_ids + n, mask=valid, other=-1).to(tl.int64)
        drifts = is_accepted(teacher, logprobs, token, float64(enough)) == 0
    else:
        drifts = share < float64(threshold)
    tl.store(overlap + n, tl.where(valid, share, 0.0).to(tl.float32), mask=inside)
    tl.store(drift + n, (drifts & valid).to(tl.int8), mask=inside)


def reliability_from_topk(a: Any) -> tuple[Tensor, ...]:
    k = a.student_topk_ids.shape[-1]
    overlap, drift = outputs_of(a, torch.float32, torch.bool)
    k_padded = triton.next_power_of_2(k)
    at_once = max(1, 2048 // k_padded)
    slots = a.student_topk_ids, a.student_topk_logprobs, a.teacher_topk_ids, a.teacher_topk_logprobs
    token_ids = a.token_ids if a.metric == "top_p" else None
    if drift.numel():
        with torch.cuda.device_of(drift):
            drift_kernel[(triton.cdiv(drift.numel(), at_once),)](
                *map(per_position, slots), flags(a.mask), per_position(token_ids), overlap, drift.view(torch.int8),
                drift.numel(), float64_bits(a.threshold), float64_bits(mass_of_nucleus(a.top_p)),
                K=k, K_PADDED=k_padded, POSITIONS=at_once, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return overlap, drift, *scan(drift, a)[:4]

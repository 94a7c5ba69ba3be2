"""`reliability_from_topk`: overlap and drift from candidates in the caller's order, then the scan."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import device_of, flags, float64_bits, per_position
from .scan import scan
from .summary import float64


@triton.jit
def is_accepted(ids, logprobs, token, top_p):
    """Return whether each position's token is in the nucleus (eq. 14-16). An id below 0 is padding."""
    candidate = ids >= 0
    logprobs = tl.where(candidate, logprobs.to(tl.float64), float("-inf"))
    mass = tl.cumsum(tl.exp(logprobs), 1)
    reached = ((mass >= top_p - 1e-6) & candidate).to(tl.int32)
    before = tl.cumsum(reached, 1) - reached  # prefixes that were enough before this candidate
    is_token = candidate & (before == 0) & (ids == token[:, None])
    has_nan = tl.max((logprobs != logprobs).to(tl.int32), 1)
    return (tl.max(is_token.to(tl.int32), 1) > 0) & (has_nan == 0)


@triton.jit(do_not_specialize=["positions", "threshold", "top_p"])
def drift_kernel(student_ids, teacher_ids, mask, logprobs, token_ids, overlap, drift, positions, threshold, top_p,
                 K: tl.constexpr, K_PADDED: tl.constexpr, POSITIONS: tl.constexpr):  # fmt: skip
    """Compute overlap and drift, by acceptance if there are token_ids."""
    n = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    inside = n < positions
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
    j = tl.arange(0, K_PADDED)
    at = n[:, None] * K + j[None, :]
    exists = valid[:, None] & (j < K)[None, :]
    ids = tl.load(student_ids + at, mask=exists, other=-1).to(tl.int64)
    hits = tl.zeros([POSITIONS, K_PADDED], tl.int1)
    for i in range(K):
        hits |= ids == tl.load(teacher_ids + n * K + i, mask=valid, other=-1).to(tl.int64)[:, None]
    common = tl.sum((hits & (ids >= 0)).to(tl.int32), 1)
    share = common.to(tl.float64) / K
    if token_ids is not None:
        ids = tl.load(teacher_ids + at, mask=exists, other=-1).to(tl.int64)
        token = tl.load(token_ids + n, mask=valid, other=-1).to(tl.int64)
        drifts = is_accepted(ids, tl.load(logprobs + at, mask=exists, other=0.0), token, float64(top_p)) == 0
    else:
        drifts = share < float64(threshold)
    tl.store(overlap + n, tl.where(valid, share, 0.0).to(tl.float32), mask=inside)
    tl.store(drift + n, (drifts & valid).to(tl.int8), mask=inside)


def reliability_from_topk(a: Any) -> tuple[Tensor, ...]:
    *shape, k = a.student_topk_ids.shape
    new: Any = a.student_topk_ids.new_empty
    overlap, drift = new(shape, dtype=torch.float32), new(shape, dtype=torch.bool)
    k_padded = triton.next_power_of_2(k)
    at_once = max(1, 2048 // k_padded)
    logprobs, token_ids = (a.teacher_topk_logprobs, a.token_ids) if a.metric == "top_p" else (None, None)
    if drift.numel():
        with device_of(drift):
            drift_kernel[(triton.cdiv(drift.numel(), at_once),)](
                per_position(a.student_topk_ids), per_position(a.teacher_topk_ids), flags(a.mask),
                per_position(logprobs), per_position(token_ids), overlap, drift.view(torch.int8), drift.numel(),
                float64_bits(a.threshold), float64_bits(a.top_p), K=k, K_PADDED=k_padded, POSITIONS=at_once,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return overlap, drift, *scan(drift, a)
